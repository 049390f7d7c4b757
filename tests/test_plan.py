"""`llmprune.plan`: what it foretells is what a run does, and it reads no weight."""

import functools
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import llmprune
import tiny
from llmprune import cli, forecast, hub, kernels
from llmprune.checkpoint import Source
from llmprune.errors import LlmpruneError
from llmprune.forecast import Part, Workload
from llmprune.forecast.disk import disk
from llmprune.forecast.duration import forward_seconds, solving_seconds, statistics_seconds, tuning_seconds
from llmprune.forecast.memory import loading_memory, outer_memory, stage_memory
from llmprune.forecast.yardstick import SolvingTime, copied_bytes, solving_bytes, solving_time, statistic_work
from llmprune.methods import get
from llmprune.model import Lanes, Outline, Streamed
from llmprune.model.collect import Collector
from llmprune.model.gradients import Tape
from llmprune.model.groups import Group, first_lane
from llmprune.model.live import LiveBytes, bytes_of
from llmprune.model.outline import zeros
from llmprune.model.probe import Trial, _line, _per_flop, try_blocks, waiting_bytes
from llmprune.model.sites import Site, sites_of
from llmprune.model.skeleton import merged_on_load
from llmprune.patterns import NM, Unstructured
from llmprune.preview import Preview
from llmprune.statistics import ColumnNorm, CrossGram, Gram

CPU = torch.device("cpu")
FAMILIES = sorted(tiny.FAMILIES | tiny.EXPERTS)
OPTIONS: dict[str, Any] = {"method": "wanda", "pattern": "2:4", "length": 24, "samples": 6}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny model of a family."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def save(family: str) -> Path:
        return tiny.save(tiny.model(family), folder / family)

    return save


def config_only(model: Path, folder: Path) -> Path:
    """Return a folder that holds a model's config.json and nothing else."""
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


def outline(folder: Path) -> Outline:
    return Outline(folder, json.loads((folder / "config.json").read_text("utf-8")), CPU)


def trials_of(folder: Path, needs: Any = Gram, budget: int = 1 << 30) -> tuple[Outline, dict[str, Trial]]:
    host = outline(folder)
    host.open(CPU)
    sites = {block.name: sites_of(block) for block in host.blocks}
    return host, try_blocks(host, sites, needs, budget, False, CPU, tiny.CONTEXT)


def test_a_plan_for_several_ranks_is_of_each(saved: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"length": 24, "samples": 6, "pattern": "50%"}
    parts = [{p.name: p.amount for p in llmprune.plan(saved("llama"), ranks=n, **options).memory} for n in (1, 2, 4)]
    hidden = [found["hidden states"] for found in parts]
    assert hidden[0] == 2 * hidden[1] == 3 * hidden[2]  # the rank with the most has 2 of 6 sequences among 4
    one = llmprune.plan(saved("llama"), ranks=1, **options)
    two = llmprune.plan(saved("llama"), ranks=2, **options)
    assert "exchange" not in {part.name for part in one.time}
    assert "10 Gbit/s" in {part.name: part.origin for part in two.time}["exchange"]
    assert any("each of 2 ranks" in note for note in two.notes)
    with pytest.raises(LlmpruneError, match="ranks"):
        llmprune.plan(saved("llama"), ranks=0, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_is_what_a_run_then_does(saved: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    plan = llmprune.plan(saved(family), **OPTIONS)
    report = llmprune.prune(saved(family), tmp_path / "out", calibration=tiny.ids(), **OPTIONS).to_json()
    found = plan.to_json()
    assert found["blocks"] == report["parameters"]["blocks"]
    assert sum(found["sites"].values()) == len(report["sites"])
    assert found["parameters"]["sites"] == report["parameters"]["sites"]
    assert found["parameters"]["all"] == report["parameters"]["all"]
    assert found["coverage"] == pytest.approx(report["coverage"])
    assert found["left_dense"] == report["left_dense"]
    assert found["left_dense_counts"] == dict(Counter(report["left_dense"].values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_that_the_weights_lead_to(saved: Callable[[str], Path], family: str) -> None:
    """Zeros choose other experts than the weights do, so of experts the sites count, and not their order."""
    _, trials = trials_of(saved(family))
    host = Streamed(Source.open(saved(family)), CPU)
    host.open(CPU)
    with Lanes(host.model, host.blocks, [tiny.ids(1, 24)], CPU, host.device_of) as lanes:
        for index, block in enumerate(host.blocks):
            host.load(block)
            found = [len(group.sites) for group in first_lane(lanes, index, sites_of(block))[0]]
            assert sorted(len(group.sites) for group in trials[block.name].groups) == sorted(found)
            host.free(block) if index + 1 == len(host.blocks) else lanes.advance(index)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "mixtral"])
def test_a_config_alone_plans_the_same(saved: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    whole = llmprune.plan(saved(family), **OPTIONS).to_json()
    alone = llmprune.plan(config_only(saved(family), tmp_path / "alone"), **OPTIONS).to_json()
    for key in ("blocks", "groups", "sites", "parameters", "coverage", "left_dense"):
        assert alone[key] == whole[key]
    assert alone["disk"]["bytes"] == pytest.approx(whole["disk"]["bytes"], rel=0.05)
    assert any("config.json" in note for note in alone["notes"]) and "config.json" in alone["disk"]["origin"]


def test_of_a_model_on_the_hub_the_config_is_fetched(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fetch(model: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((model, revision, patterns))
        return config_only(saved("llama"), tmp_path / "fetched")

    monkeypatch.setattr(hub, "fetch_model", fetch)
    assert llmprune.plan("org/name", revision="v1", **OPTIONS).blocks == tiny.BLOCKS
    assert asked == [("org/name", "v1", ["config.json"])]


def test_no_weight_is_read(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Source, "slices", refuse)
    for family in ("llama-tied", "qwen3-moe"):
        assert llmprune.plan(saved(family), **OPTIONS).blocks == tiny.BLOCKS
    damaged = tiny.save(tiny.model("llama"), tmp_path / "damaged")
    tiny_nan = {name: torch.full_like(value, torch.nan) for name, value in tiny.tensors(damaged).items()}
    assert llmprune.plan(tiny.rewrite(damaged, **tiny_nan), **OPTIONS).blocks == tiny.BLOCKS


WRONG: list[dict[str, Any]] = [
    {"method": "wandaa"},
    {"pattern": "5:4"},
    {"pattern": "3:7"},
    {"exclude": ["*"]},
    {"include": ["nothing"]},
    {"include": ["model.embed_tokens.weight"]},
    {"length": tiny.CONTEXT + 1},
    {"device": "meta"},
    {"sampels": 3},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_wrong_is_said_as_by_a_run(saved: Callable[[str], Path], tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(LlmpruneError) as planned:
        llmprune.plan(saved("llama"), **(OPTIONS | wrong))
    with pytest.raises(LlmpruneError) as pruned:
        llmprune.prune(saved("llama"), tmp_path / "out", calibration=tiny.ids(), **(OPTIONS | wrong))
    assert (type(planned.value), str(planned.value)) == (type(pruned.value), str(pruned.value))
    assert "\n" not in str(planned.value)


@pytest.mark.parametrize("field", ["model_type", "quantization_config", None])
def test_a_folder_that_cannot_be_pruned_cannot_be_planned(
    saved: Callable[[str], Path], tmp_path: Path, field: str | None
) -> None:
    folder = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    changed = (
        fields | {"model_type": "lama"} if field == "model_type" else fields | {field: {"bits": 4}} if field else {}
    )
    (folder / "config.json").write_text(json.dumps(changed), "utf-8")
    with pytest.raises(LlmpruneError) as planned:
        llmprune.plan(folder, **OPTIONS)
    with pytest.raises(LlmpruneError) as pruned:
        llmprune.prune(folder, tmp_path / "out", **OPTIONS)
    assert (type(planned.value), str(planned.value)) == (type(pruned.value), str(pruned.value))


def test_a_loaded_model_is_not_planned() -> None:
    with pytest.raises(LlmpruneError, match="not for a loaded model"):
        llmprune.plan(tiny.model("llama"))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_parts_add_up(saved: Callable[[str], Path], method: str) -> None:
    plan = llmprune.plan(saved("qwen3-moe"), **(OPTIONS | {"method": method}))
    found = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    memory, time = found["memory"], found["time"]
    assert memory["peak_bytes"] == {"host": sum(part["bytes"] for part in memory["parts"]), "device": 0}
    assert time["seconds"] == pytest.approx(sum(part["seconds"] for part in time["parts"]), abs=0.01)
    assert all(part["origin"] for part in [*memory["parts"], *time["parts"], found["disk"]])
    assert (found["groups"] is None) == (method == "magnitude")
    assert {part["name"] for part in memory["parts"]} >= {"this process", "outside the blocks", "one block"}


def test_the_text_is_short_and_says_what_matters(saved: Callable[[str], Path]) -> None:
    text = str(llmprune.plan(saved("gemma2"), **(OPTIONS | {"exclude": ["*.0.mlp.*"]})))
    assert len(text.splitlines()) <= 25
    for word in ("matrices", "3 excluded", "left dense", "memory", "disk", "time", "MiB"):
        assert word in text


def test_more_calibration_takes_more_of_what_grows_with_it(saved: Callable[[str], Path]) -> None:
    def parts(**options: Any) -> dict[str, float]:
        plan = llmprune.plan(saved("llama"), **(OPTIONS | options))
        return {part.name: part.amount for part in plan.memory}

    few, many = parts(samples=4), parts(samples=40)
    assert many["hidden states"] == pytest.approx(10 * few["hidden states"])
    assert many["one block"] == few["one block"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_an_outline_costs_what_the_checkpoint_does(saved: Callable[[str], Path], family: str) -> None:
    host, source = outline(saved(family)), Source.open(saved(family))
    stored = sum(entry.count * entry.torch_dtype.itemsize for entry in source.entries.values())
    blocks = sum(stage_memory(host, block, "host").amount for block in host.blocks)
    head = 0 if host.config.tie_word_embeddings else host.bytes_of(host.head)
    assert blocks + head + outer_memory(host).amount == stored
    assert disk(host, None).amount == stored <= disk(host, source).amount


def test_experts_stored_one_by_one_are_merged(saved: Callable[[str], Path]) -> None:
    merging, whole = outline(saved("mixtral")), outline(saved("gpt-oss"))
    block = merging.blocks[0]
    experts = sum(p.nbytes for name, p in block.module.named_parameters() if ".experts." in name)
    assert loading_memory(block, merged_on_load(merging.model), "host").amount == experts > 0
    assert loading_memory(whole.blocks[0], merged_on_load(whole.model), "host").amount == 0


def test_an_outline_keeps_nothing_of_a_block_it_has_left(saved: Callable[[str], Path]) -> None:
    host, _ = trials_of(saved("llama-tied"))
    assert all(parameter.is_meta for block in host.blocks for parameter in block.module.parameters())
    assert not host.embedding.module.get_parameter("weight").is_meta


def test_zeros_are_zeros_of_their_shape_and_dtype() -> None:
    made = zeros((3, 5), torch.bfloat16, CPU)
    assert torch.equal(made, torch.zeros(3, 5, dtype=torch.bfloat16))
    assert zeros((0, 5), torch.float16, CPU).shape == (0, 5)


def test_operations_of_a_llama_block_are_counted(saved: Callable[[str], Path]) -> None:
    """Twice the weights for each token; the attention's two products of 4 heads x 16 for each pair of tokens."""
    host, trials = trials_of(saved("llama"))
    weights = sum(site.shape[0] * site.shape[1] for site in sites_of(host.blocks[0]))
    trial = trials[host.blocks[0].name]
    assert trial.flops[0] == pytest.approx(2 * weights)
    assert trial.flops[1] == pytest.approx(2 * 2 * 4 * 16)
    assert trial.forward_flops(100) == pytest.approx(200 * weights + 256 * 100**2)


def test_of_experts_only_those_that_are_chosen_work(saved: Callable[[str], Path]) -> None:
    host, trials = trials_of(saved("mixtral"))
    trial = trials[host.blocks[0].name]
    expert = [fed for group, fed in zip(trial.groups, trial.fed, strict=True) if group.sites[0].expert is not None]
    assert sum(expert) == pytest.approx(2 * 2)  # two chosen experts, two matrices each
    sites = sites_of(host.blocks[0])
    chosen = sum(s.shape[0] * s.shape[1] * (0.5 if s.expert is not None else 1) for s in sites)
    router = 4 * 64
    assert trial.flops[0] == pytest.approx(2 * (chosen + router))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_what_waits_grows_with_sequences_and_holds_their_hidden_states(
    saved: Callable[[str], Path], family: str
) -> None:
    host, _ = trials_of(saved(family))
    hidden = 20 * 64 * 4
    one, three = (waiting_bytes(host, count, 20, CPU) for count in (1, 3))
    assert hidden <= one < 12 * hidden and 2 * hidden <= three - one <= 3 * one


def test_statistics_over_the_budget_are_summed_in_several_runs(saved: Callable[[str], Path]) -> None:
    _, at_once = trials_of(saved("llama"))
    _, in_turns = trials_of(saved("llama"), budget=Gram.nbytes(64))
    (first, *_), (second, *_) = at_once.values(), in_turns.values()
    assert (first.statistics_bytes, first.runs) == (3 * Gram.nbytes(64) + Gram.nbytes(96), 1)
    assert (second.statistics_bytes, second.runs) == (Gram.nbytes(96), 4)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_demand_foretold_is_the_collector_s_own(saved: Callable[[str], Path], family: str, share: float) -> None:
    host = Streamed(Source.open(saved(family)), CPU)
    host.open(CPU)
    host.load(host.blocks[0])
    sites = sites_of(host.blocks[0])
    budget = int(share * sum(Gram.nbytes(site.shape[1]) for site in sites))
    with Lanes(host.model, host.blocks, list(tiny.ids(6, 48).split(1)), CPU, host.device_of) as lanes:
        collector = Collector(lanes, Gram, budget)
        most, runs = collector.demand(first_lane(lanes, 0, sites)[0])
        held = max(_held(collector, sites))
    assert held <= most <= max(budget, Gram.nbytes(96)) + Gram.nbytes(96)
    assert runs == collector.most_runs or family == "mixtral"  # starved experts are run once more


def _held(collector: Collector, sites: list[Site]) -> list[int]:
    """Return the bytes of the statistic in each group as it is yielded: together they are never more."""
    held = []
    for group in collector.groups(0, sites):
        held.append(Gram.nbytes(group.inputs) if group.statistic else 0)
        group.statistic = None
    return held


def trial(groups: list[Group], fed: list[float], runs: int = 1) -> Trial:
    return Trial(groups, fed, (1000.0, 2.0), 0.001, 1.0, 1.0, 1, runs)


def site(outputs: int, inputs: int) -> Site:
    return Site("a.weight", torch.nn.Linear(inputs, outputs), "weight", (outputs, inputs), transposed=False)


def test_forwards_take_what_they_compute() -> None:
    work = Workload(3, 10, 1, CPU)
    whole = 3 * (1000 * 10 + 2 * 10**2) * 0.001
    spared = 30 * 2 * 8 * 4 * 0.001
    stops = trial([Group([site(8, 4)], calls=1)], [1.0])
    assert forward_seconds([stops], work).amount == pytest.approx(whole - spared)
    assert forward_seconds([stops, stops], work).amount == pytest.approx(3 * whole - 2 * spared)
    assert forward_seconds([trial([], []), stops], work).amount == pytest.approx(2 * whole - spared)
    thrice = trial([Group([site(8, 4)], calls=1)], [1.0], runs=3)
    assert forward_seconds([thrice], work).amount == pytest.approx(2 * whole)


def test_statistics_take_what_their_inputs_are_wide() -> None:
    work = Workload(3, 10, 1, CPU)
    experts = trial([Group([site(8, 4)]), Group([site(8, 6)])], [1.0, 0.5])
    assert statistics_seconds([experts], work, ColumnNorm, 2.0, CPU).amount == 30 * (4 + 3) * 2
    grams = statistic_work(Gram, 4) + statistic_work(Gram, 6) / 2
    assert statistics_seconds([experts], work, Gram, 2.0, CPU).amount == 30 * grams * 2


def test_a_factor_is_made_once_for_sites_that_share_it() -> None:
    times = SolvingTime(cube=1.0, column=10.0, weight=100.0, product=1000.0)
    assert times.seconds([(2, 3)]) == 27 + 3 * 10 + 6 * 100 + 18 * 1000
    shared = Group([site(2, 3), site(4, 3)])
    assert solving_seconds([[shared]], times, llmprune.Recipe(), 1).amount == 27 + 2 * 3 * 10 + 18 * 100 + 54 * 1000


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.5, "model"), NM(1, 7)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_method_is_timed(method: str, pattern: Unstructured | NM) -> None:
    if method != "magnitude" and pattern == Unstructured(0.5, "model"):
        pytest.skip("only magnitudes are compared over a whole model")
    solver = get(method)
    times = solving_time(solver, pattern, torch.float32, CPU)
    assert min(times.cube, times.column, times.weight, times.product) >= 0
    assert times.seconds([(512, 512)]) > 0
    assert (times.cube + times.product > 0) <= (method == "sparsegpt")


def test_solving_in_parts_takes_no_more_for_a_larger_matrix() -> None:
    wanda, rows = get("wanda"), Unstructured(0.5, "row")
    small, large = (solving_bytes(wanda, rows, (outputs, 512), torch.float32, CPU) for outputs in (2048, 65536))
    assert large == small >= 2048 * 512 * 4
    sparsegpt, layer = get("sparsegpt"), Unstructured(0.5, "block")
    small, large = (solving_bytes(sparsegpt, layer, (side, side), torch.float32, CPU) for side in (512, 4096))
    assert large > 16 * small / 2


def test_copies_for_a_statistic_are_in_proportion_to_its_inputs() -> None:
    narrow, wide, longer = (
        copied_bytes(Gram, inputs, tokens, torch.bfloat16, CPU)
        for inputs, tokens in ((1024, 256), (4096, 256), (1024, 512))
    )
    assert wide == pytest.approx(4 * narrow)
    if kernels.multiplies(torch.empty(1, 1, dtype=torch.bfloat16)):
        assert narrow == longer == 1024 * 2048  # a buffer of the compiled kernel, and no copies
    else:
        assert longer - narrow >= 256 * 1024 * 8  # two copies in float32


def test_copies_for_a_dense_target_are_of_both_inputs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one, both = (copied_bytes(needs, 512, 2048, dtype, CPU) for needs in (Gram, CrossGram))
        assert both >= one > 0
        assert both < 512 * 512 * 4 + 3 * 2048 * 512 * 4 + 512 * 4096, "the sums themselves are no copies"


def test_live_bytes_follow_tensors_and_not_views() -> None:
    given = torch.zeros(100)
    with LiveBytes() as live:
        assert given.view(10, 10).add_(1).T is not None and live.now == 0
        made = given + 1
        part = made[:2]
        doubled = made * 2
        assert live.now == live.peak == 800
        del made, doubled
        assert live.now == 400 and bytes_of([part, {"again": part}]) == 400
        del part
    assert (live.now, live.peak) == (0, 800)


def test_memory_of_a_gpu_is_told_apart() -> None:
    parts = [Part("a", 1, ""), Part("b", 2, "", "device"), Part("c", 4, "")]
    assert forecast.peak(parts) == {"host": 5, "device": 2}


def test_the_command_line_plans_too(saved: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: wanda\npattern: 2:4\nexclude: '*.0.*'\n", "utf-8")
    arguments = ["plan", str(saved("llama")), "--recipe", str(recipe), "--length", "24", "--samples", "6"]
    shown = CliRunner().invoke(cli.cli, arguments)
    assert shown.exit_code == 0 and "14 Linear in 8 groups" in shown.stdout
    found = json.loads(CliRunner().invoke(cli.cli, [*arguments, "--json"]).stdout)
    same = json.loads(json.dumps(llmprune.plan(saved("llama"), **(OPTIONS | {"exclude": "*.0.*"})).to_json()))
    for key in found.keys() - {"memory", "time"}:
        assert found[key] == same[key]


def test_keys_are_those_that_are_documented(saved: Callable[[str], Path]) -> None:
    documented = set(re.findall(r"^    ([a-z_, ]+):", Preview.__doc__ or "", re.MULTILINE))
    keys = {key for line in documented for key in line.split(", ")}
    assert llmprune.plan(saved("llama"), method="magnitude").to_json().keys() == keys


def test_tuning_has_its_time_and_its_memory(saved: Callable[[str], Path]) -> None:
    plain, twice, four = (
        llmprune.plan(saved("llama"), **OPTIONS, tune_epochs=epochs, device="cpu") for epochs in (0, 2, 4)
    )
    tuning = [part.amount for plan in (twice, four) for part in plan.time if part.name == "tuning"]
    assert not any(part.name == "tuning" for part in plain.time)
    assert len(tuning) == 2 and tuning[1] > tuning[0] > 0
    parts = {part.name: part.amount for part in twice.memory}
    assert parts["weights while tuned"] == 32 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    assert sum(forecast.peak(twice.memory).values()) > sum(forecast.peak(plain.memory).values())


DENSE: dict[str, Any] = {
    "preset": "fast",
    "pattern": "50%",
    "length": 24,
    "samples": 6,
    "device": "cpu",
    "autocast": False,
}


def by_name(parts: list[Part]) -> dict[str, float]:
    return {part.name: part.amount for part in parts}


def test_a_dense_target_holds_the_sequences_twice(saved: Callable[[str], Path]) -> None:
    """As the presets do: `fast` here, which is quick to plan."""
    twice, once = (llmprune.plan(saved("llama"), **DENSE, **options) for options in ({}, {"dense_target": 0}))
    found, plain = by_name(twice.memory), by_name(once.memory)
    for name in ("hidden states", "all batches within a block", "statistics"):
        assert found[name] == pytest.approx(2 * plain[name]) and plain[name] > 0
    assert plain["statistics"] == Gram.nbytes(96), "of one group at a time"
    assert found["dense weights"] == 4 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96) and "dense weights" not in plain
    assert "of the dense model" in {part.name: part.origin for part in twice.memory}["hidden states"]


def test_sequences_in_the_dense_model_take_a_forward_each() -> None:
    work = Workload(3, 10, 1, CPU, dense_stream=True, side_by_side=True)
    whole = 3 * (1000 * 10 + 2 * 10**2) * 0.001
    held = replace(trial([Group([site(8, 4)], calls=1)], [1.0]), side_by_side=True)
    assert forward_seconds([held, held], work).amount == pytest.approx(2 * whole)
    assert forward_seconds([held, held], work, [held, held]).amount == pytest.approx(4 * whole)
    assert forward_seconds([held, held], work, [held, held], tuned=True).amount == pytest.approx(5 * whole)
    assert (work.batches, work.lanes) == (3, 6)


def test_statistics_of_a_dense_target_take_a_product_more() -> None:
    work = Workload(3, 10, 1, CPU)
    experts = trial([Group([site(8, 4)])], [1.0])
    assert statistic_work(CrossGram, 4) == statistic_work(Gram, 4) + 2 * 4 * 4
    held = replace(experts, side_by_side=True)
    assert statistics_seconds([held], work, CrossGram, 2.0, CPU).amount == 60 * statistic_work(CrossGram, 4)
    assert statistics_seconds([experts], work, CrossGram, 2.0, CPU).amount == 60 * statistic_work(Gram, 4)


def test_solving_towards_a_dense_target_takes_a_mixture_more() -> None:
    sparsegpt, half = get("sparsegpt"), Unstructured(0.5, "block")
    plain, mixed = (solving_bytes(sparsegpt, half, (512, 512), torch.float32, CPU, share) for share in (0.0, 0.5))
    assert mixed - plain >= Gram.nbytes(512)


def test_blocks_with_experts_get_no_dense_target(saved: Callable[[str], Path]) -> None:
    twice, once = (llmprune.plan(saved("qwen3-moe"), **DENSE, **options) for options in ({}, {"dense_target": 0}))
    found, plain = by_name(twice.memory), by_name(once.memory)
    assert found["hidden states"] == pytest.approx(2 * plain["hidden states"])
    assert found["statistics"] == plain["statistics"] and "all batches within a block" not in found
    assert found["outputs of a block"] == 6 * 24 * 64 * 4


def test_tuning_holds_the_sequences_twice_and_what_the_dense_block_puts_out(saved: Callable[[str], Path]) -> None:
    tuned, plain = (llmprune.plan(saved("llama"), **OPTIONS, tune_epochs=epochs, device="cpu") for epochs in (1, 0))
    found = by_name(tuned.memory)
    assert found["hidden states"] == pytest.approx(2 * by_name(plain.memory)["hidden states"])
    assert found["outputs of a block"] == 6 * 24 * 64 * 4


def test_a_dense_target_that_does_not_fit_is_said(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.forecast.parts.fits_side_by_side", lambda *_: False)
    twice, once = (llmprune.plan(saved("llama"), **DENSE, **options) for options in ({}, {"dense_target": 0}))
    assert any("288 tokens, too many here" in note for note in twice.notes)
    assert not any("too many" in note for note in once.notes)
    assert "all batches within a block" not in by_name(once.memory)


def test_ranks_hand_round_the_dense_models_inputs_too(saved: Callable[[str], Path]) -> None:
    twice, once = (llmprune.plan(saved("llama"), ranks=2, **DENSE, **options) for options in ({}, {"dense_target": 0}))
    exchange = [by_name(plan.time)["exchange"] for plan in (twice, once)]
    inputs = 6 * 24 * (3 * 64 + 96) * 4 * tiny.BLOCKS / 2
    sums = sum(Gram.nbytes(width) for width in (64, 64, 64, 96)) * tiny.BLOCKS / 2
    assert (exchange[0] - exchange[1]) * 1.25e9 == pytest.approx(inputs + sums)


def test_ranks_share_a_step_of_tuning_by_its_batches_and_hand_round_their_gradients(
    saved: Callable[[str], Path],
) -> None:
    assert [Workload(16, 10, 1, CPU, ranks=ranks).step for ranks in (1, 2, 8, 16)] == [(4, 4), (4, 4), (4, 2), (4, 1)]
    assert Workload(16, 10, 4, CPU, ranks=8).step == (1, 1)
    assert Workload(2, 10, 1, CPU, ranks=4).step == (2, 1), "a step has no more batches than there are"
    twice, once = (llmprune.plan(saved("llama"), ranks=2, **DENSE, tune_epochs=epochs) for epochs in (3, 1))
    exchange = [by_name(plan.time)["exchange"] for plan in (twice, once)]
    weights = tiny.BLOCKS * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert (exchange[0] - exchange[1]) * 1.25e9 == pytest.approx((3 - 1) * 6 * weights * 4 / 2)


@pytest.mark.parametrize(("sequences", "ranks"), [(16, 1), (16, 2), (5, 3), (4, 4), (2, 4)])
def test_a_step_of_tuning_waits_for_the_rank_with_the_most_of_its_batches(sequences: int, ranks: int) -> None:
    workload = Workload(sequences, 10, 1, CPU, ranks=ranks)
    drawn = list(itertools.combinations([number % ranks for number in range(sequences)], workload.step[0]))
    assert max(max(Counter(owners).values()) for owners in drawn) == workload.step[1]
    average = sum(max(Counter(owners).values()) for owners in drawn) / len(drawn)
    assert workload.waited_for == pytest.approx(average)
    seconds = tuning_seconds([trial([Group([site(8, 4)], calls=1)], [1.0])], workload, 1).amount
    assert seconds == pytest.approx(3 * sequences * (1000 * 10 + 2 * 10**2) * 0.001 * average / workload.step[0])


def test_ranks_hand_round_what_shares_out_a_sparsity(saved: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"method": "wanda", "length": 24, "samples": 10}
    plain, owl, fisher = (
        by_name(llmprune.plan(saved("llama"), ranks=2, allocation=way, **options).time)["exchange"]
        for way in ("uniform", "owl", "fisher")
    )
    inputs = 8 * 24 * (3 * 64 + 96) * 4 * tiny.BLOCKS / 2
    sums = sum(Gram.nbytes(width) / 2 for width in (64, 64, 64, 96)) * tiny.BLOCKS / 2
    assert (owl - plain) * 1.25e9 == pytest.approx(inputs + sums)
    assert (fisher - owl) * 1.25e9 == pytest.approx(4 * 4 * (2 * 64 + 2 * 32 + 2 * 96 + 64) * tiny.BLOCKS / 2)


@pytest.mark.skipif(not kernels.multiplies_bfloat16(CPU), reason="float32 is as fast here")
def test_a_plan_knows_what_is_multiplied_in_bfloat16(saved: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"method": "sparsegpt", "length": 24, "samples": 6}
    half, full = (llmprune.plan(saved("llama"), ranks=2, autocast=asked, **options) for asked in (True, False))
    inputs = 6 * 24 * (3 * 64 + 96) * tiny.BLOCKS / 2
    exchange = [by_name(plan.time)["exchange"] * 1.25e9 for plan in (half, full)]
    assert exchange[1] - exchange[0] == pytest.approx((4 - 2) * inputs)
    assert (
        "measured with one batch of 6 x 24 tokens" in {part.name: part.origin for part in half.memory}["hidden states"]
    )


@pytest.mark.skipif(not kernels.multiplies_bfloat16(CPU), reason="float32 is as fast here")
def test_a_forward_that_rounds_weights_takes_what_is_foretold(saved: Callable[[str], Path]) -> None:
    folder, tokens = saved("llama"), tiny.CONTEXT
    host = outline(folder)
    host.open(CPU)
    sites = {block.name: sites_of(block) for block in host.blocks}
    trials = try_blocks(host, sites, Gram, 1 << 30, False, CPU, tokens, autocast=torch.bfloat16, at_once=tokens)
    host.load(host.blocks[0])
    with (
        Lanes(host.model, host.blocks, [tiny.ids(1, tokens)], CPU, host.device_of, torch.bfloat16) as lanes,
        LiveBytes() as live,
    ):
        lanes.run(0, 0)
    found = trials[host.blocks[0].name]
    assert found.forward_memory(tokens) == pytest.approx(live.peak, rel=0.3)
    assert found.rounded_bytes > 0 and found.seconds_per_flop > 0 and found.plain_seconds_per_flop > 0


def test_rounding_weights_counts_once_a_forward() -> None:
    assert _line((8, 64), (30.0, 142.0)) == (2.0, 14.0)
    assert _per_flop((100, 1000), (7.0, 25.0), 10_000) == pytest.approx(0.02 + 5.0 / 10_000)
    assert _line((8, 64), (30.0, 20.0)) == (0.0, 30.0), "measured times may fall"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_held_within_a_block_take_what_is_foretold(saved: Callable[[str], Path], family: str) -> None:
    _, trials = trials_of(saved(family))
    host = Streamed(Source.open(saved(family)), CPU)
    host.open(CPU)
    host.load(host.blocks[0])
    held = []
    with Lanes(host.model, host.blocks, list(tiny.ids(6, tiny.CONTEXT).split(1)), CPU, host.device_of) as lanes:
        collector = Collector(lanes, Gram, 1 << 30, true_sequential=True, side_by_side=True)
        with LiveBytes() as live:
            for group in collector.groups(0, sites_of(host.blocks[0])):
                held.append(live.now - Gram.nbytes(group.inputs))
                group.statistic = None
    foretold = 6 * tiny.CONTEXT * trials[host.blocks[0].name].held_bytes
    assert foretold == pytest.approx(max(held), rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("labels", "options"), [("sampled", {"allocation": "fisher"}), ("text", {"method": "taylor"})])
def test_setting_out_backward_takes_what_is_foretold(
    tmp_path: Path, dtype: torch.dtype, labels: Any, options: dict[str, Any]
) -> None:
    """Of a model whose vocabulary is all that counts, as it is of a small model and a long sequence."""
    length = 2 * tiny.CONTEXT
    model = tiny.model("llama", dtype, vocab_size=8000, max_position_embeddings=length)
    folder = tiny.save(model, tmp_path / "model")
    foretold = by_name(llmprune.plan(folder, samples=2, length=length, device="cpu", **options).memory)
    host = Streamed(Source.open(folder), CPU)
    host.open(CPU)
    stages, last = [*host.blocks, host.head], len(host.blocks) - 1
    with Lanes(host.model, stages, [tiny.ids(1, length)], CPU, host.device_of) as lanes:
        tape = Tape(lanes, of_weights=False, labels=labels)
        for index in range(last):
            host.load(host.blocks[index])
            tape.forward(index)
        with LiveBytes() as live:
            next(tape.backward(host, last, {}))
    assert foretold["predictions"] + foretold["head"] == pytest.approx(live.peak, rel=0.1)  # the head is read within
    assert foretold["head"] == 8000 * 64 * dtype.itemsize


@pytest.mark.parametrize(("method", "more"), [("admm", 4), ("sparsegpt", 4), ("magnitude", 0)])
def test_weighing_rows_takes_a_copy_of_a_matrix(method: str, more: int) -> None:
    """Where that is solved from copies of its own; else it is among them, as the whole matrix is solved at once."""
    plain, weighed = (
        solving_bytes(get(method), Unstructured(0.5, "layer"), (256, 128), torch.float32, CPU, 0.0, rows)
        for rows in (False, True)
    )
    assert weighed - plain >= more * 256 * 128
    assert weighed <= plain + 8 * 256 * 128
