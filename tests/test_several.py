"""Several results from one calibration pass: what each is, that blocks are loaded and measured once, and resuming."""

import itertools
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llmprune
import tiny
from llmprune import cli, feeding, runs, several
from llmprune.branch import SOLVE
from llmprune.branches import OnBranch, Pass
from llmprune.checkpoint.compressed import compress, compress_shards
from llmprune.errors import CheckpointError, LlmpruneError, PatternError, RecipeError
from llmprune.model import Streamed
from llmprune.model.collect import Collector
from llmprune.report import Clock
from llmprune.statistics import Gram
from llmprune.storing import OnDisk

PATTERNS = ["50%", "70%", "2:4"]
NAMES = ["50%", "70%", "2of4"]
OPTIONS: dict[str, Any] = {"calibration": tiny.ids(4, 16), "method": "sparsegpt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    made = {name: tiny.save(tiny.model(name), place / name) for name in ("llama", "gpt2", "qwen3-moe")}
    made["bfloat16"] = tiny.save(tiny.model("llama", torch.bfloat16), place / "bfloat16")
    return made


def on_dense_inputs(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Prune block by block with llmprune.solve, each from the inputs that hooks see in the whole dense model."""
    model = tiny.load(folder)
    linears = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    seen: dict[str, Gram] = {}

    def see(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            gram = seen.setdefault(name, Gram(inputs[0].shape[-1], torch.device("cpu")))
            gram.add(inputs[0].flatten(0, 1), 1)

        return hook

    for name, part in linears.items():
        part.register_forward_pre_hook(see(name))
    for row in OPTIONS["calibration"]:
        tiny.logits(model, row[None])
    return {
        f"{name}.weight": llmprune.solve(part.weight.data, seen[name], **options).weight_OI
        for name, part in linears.items()
        if name != "lm_head"
    }


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_each_result_is_solved_from_the_dense_model(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    reports = llmprune.prune(folders["llama"], tmp_path / "out", pattern=PATTERNS, **OPTIONS | {"method": method})
    assert [report.out for report in reports] == [tmp_path / "out" / name for name in NAMES]
    for pattern, report in zip(PATTERNS, reports, strict=True):
        assert report.out is not None and llmprune.inspect(report.out).verified
        found = tiny.tensors(report.out)
        for name, weight in on_dense_inputs(folders["llama"], method=method, pattern=pattern).items():
            assert torch.equal(found[name] == 0, weight == 0), name
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe", "bfloat16"])
def test_the_first_block_is_that_of_a_run_of_its_own(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    llmprune.prune(folders[family], tmp_path / "out", pattern=["50%", "2:4"], **OPTIONS)
    dense = tiny.tensors(folders[family])
    for pattern, name in (("50%", "50%"), ("2:4", "2of4")):
        llmprune.prune(folders[family], tmp_path / name, pattern=pattern, **OPTIONS)
        alone, together = tiny.tensors(tmp_path / name), tiny.tensors(tmp_path / "out" / name)
        assert together.keys() == alone.keys()
        assert llmprune.inspect(tmp_path / "out" / name).verified
        first = [key for key in alone if ".0." in key.replace("experts.0.", "experts.x.")]
        assert first and all(tiny.same_bytes(alone[key], together[key]) for key in first if ".1." not in key)
        later = [key for key in alone if ".2." in key and not tiny.same_bytes(alone[key], dense[key])]
        assert later and any(not tiny.same_bytes(alone[key], together[key]) for key in later)


def test_blocks_are_loaded_and_measured_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, collected = list[str](), list[int]()
    load, groups = Streamed.load, Collector.groups

    def counted_load(host: Streamed, stage: Any, *rest: Any) -> None:
        loads.append(stage.name)
        load(host, stage, *rest)

    def counted_groups(room: Collector, index: int, sites: Any) -> Any:
        collected.append(index)
        return groups(room, index, sites)

    monkeypatch.setattr(Streamed, "load", counted_load)
    monkeypatch.setattr(Collector, "groups", counted_groups)
    llmprune.prune(folders["llama"], tmp_path / "out", pattern=PATTERNS, **OPTIONS)
    assert loads == [f"model.layers.{block}" for block in range(tiny.BLOCKS)]
    assert collected == list(range(tiny.BLOCKS))


def test_a_gram_serves_methods_that_need_column_norms() -> None:
    x_TI = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    both = llmprune.ColumnNorm(12, x_TI.device), Gram(12, x_TI.device)
    for statistic in both:
        statistic.add(x_TI[:30], 1)
        statistic.add(x_TI[30:], 3)
    torch.testing.assert_close(both[1].norm_I, both[0].norm_I)


def test_methods_share_a_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    asked = {tmp_path / name: {"method": name, "pattern": "2:4"} for name in ("magnitude", "wanda", "sparsegpt")}
    reports = several.prune_several(folders["llama"], asked, calibration=OPTIONS["calibration"])
    assert {site.error_norm for report in reports for site in report.sites} == {"gram"}
    for at_magnitude, by_wanda, by_sparsegpt in zip(*(report.sites for report in reports), strict=True):
        assert at_magnitude.error == pytest.approx(at_magnitude.magnitude_error, rel=1e-4)
        assert by_wanda.magnitude_error == pytest.approx(at_magnitude.error, rel=1e-4)
        assert by_sparsegpt.error < by_wanda.error


def test_a_budget_over_the_model_is_split_for_each(folders: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "magnitude", "comparison_group": "model"}
    reports = llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%", "70%"], **options)
    for report, share in zip(reports, (0.5, 0.7), strict=True):
        assert report.zeros == int(report.site_parameters * share)
        llmprune.prune(folders["llama"], tmp_path / str(share), pattern=share, **options)
        assert report.out is not None and same_weights(report.out, tmp_path / str(share))


def same_weights(a: Path, b: Path) -> bool:
    left, right = tiny.tensors(a), tiny.tensors(b)
    return left.keys() == right.keys() and all(tiny.same_bytes(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The reports of a pass that nothing has interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return llmprune.prune(folders["llama"], out, pattern=PATTERNS, **OPTIONS)


@pytest.mark.parametrize("after", [1, 5, 9])  # results have kept one block, two or one, all three
def test_an_interrupted_pass_goes_on_to_the_same_bytes(
    folders: dict[str, Path], whole: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    finish, stages = OnDisk._finish, list[str]()

    def stop(store: OnDisk, stage: Any) -> None:
        finish(store, stage)
        stages.append(stage.name)
        if len(stages) == after:
            raise KeyboardInterrupt

    run: dict[str, Any] = {"pattern": PATTERNS, **OPTIONS}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="--resume"):
        patch.setattr(OnDisk, "_finish", stop)
        llmprune.prune(folders["llama"], tmp_path / "out", **run)
    assert not any((tmp_path / "out" / name).exists() for name in NAMES)
    if after > 1:  # the first of the results has kept a block
        with pytest.raises(CheckpointError, match="holds an unfinished run"):
            llmprune.prune(folders["llama"], tmp_path / "out", **run)
    reports: Any = llmprune.prune(folders["llama"], tmp_path / "out", resume=True, **run)
    for one, other in zip(reports, whole, strict=True):
        assert same_weights(one.out, other.out)
        assert one.sites == other.sites and set(one.memory) == set(other.memory)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)


def test_a_resumed_pass_tells_in_how_many_runs_its_first_part_was_collected(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, stages = OnDisk._finish, list[str]()

    def stop(store: OnDisk, stage: Any) -> None:
        finish(store, stage)
        stages.append(stage.name)
        if stages.count(stage.name) == len(NAMES):
            raise KeyboardInterrupt

    run: dict[str, Any] = {"pattern": PATTERNS, **OPTIONS}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OnDisk, "_finish", stop)
        patch.setattr(feeding, "statistics_budget", lambda *_: 1)
        llmprune.prune(folders["llama"], tmp_path / "out", **run)
    reports: Any = llmprune.prune(folders["llama"], tmp_path / "out", resume=True, **run)
    assert all(any("were collected in" in note for note in report.notes) for report in reports)


def test_memory_that_runs_out_while_a_matrix_is_written_leaves_each_result_as_it_would_be(
    folders: dict[str, Path], whole: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, asked = OnBranch._write, list[str]()

    def fail_once(store: OnBranch, site: Any) -> None:
        asked.append(site.name)
        if len(asked) == 5:
            raise MemoryError
        write(store, site)

    monkeypatch.setattr(OnBranch, "_write", fail_once)
    reports: Any = llmprune.prune(folders["llama"], tmp_path / "out", pattern=PATTERNS, **OPTIONS)
    for one, other in zip(reports, whole, strict=True):
        assert len(one.retries) == 1
        assert one.sites == other.sites and same_weights(one.out, other.out)


def test_time_to_solve_is_that_of_all_ranks_once() -> None:
    """Also of what a resumed pass has been told of, which all ranks know."""
    team = SimpleNamespace(gather=lambda mine: [mine, [0.5, 0.25]])
    clocks = [Clock({SOLVE: 10.0 + 1.0}), Clock({SOLVE: 2.0})]  # the first has taken ten seconds before, the other none
    branches = [SimpleNamespace(report=SimpleNamespace(clock=clock)) for clock in clocks]
    Pass._add_up(SimpleNamespace(team=team, branches=branches), [10.0, 0.0])  # type: ignore[arg-type]
    assert [clock.seconds[SOLVE] for clock in clocks] == [10.0 + 1.0 + 0.5, 2.0 + 0.25]


def test_a_phase_within_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr("llmprune.report.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    clock = Clock()
    with clock.phase("exchange"), clock.phase("write"):
        pass
    with clock.phase("exchange"):
        pass
    assert clock.seconds == {"write": 2.0, "exchange": 10.0 - 2.0 + 1.0}


def test_a_complete_result_is_left_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%"], **OPTIONS)
    before = (tmp_path / "out" / "50%" / "llmprune.json").read_bytes()
    first, second = llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%", "2:4"], resume=True, **OPTIONS)
    assert (tmp_path / "out" / "50%" / "llmprune.json").read_bytes() == before
    told = {name: value for name, value in json.loads(before).items() if name != "companions"}  # the output's own
    assert told == json.loads(json.dumps(first.to_json())) and llmprune.inspect(second.out or "").verified
    with pytest.raises(RecipeError, match="is of another recipe"):
        llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%"], resume=True, **OPTIONS | {"seed": 3})
    with pytest.raises(CheckpointError, match="exists: choose another folder"):
        llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%"], **OPTIONS)


@pytest.mark.parametrize("way", [{}, {"true_sequential": True}], ids=["in one pass", "one after another"])
def test_results_are_compressed_as_each_would_be(folders: dict[str, Path], tmp_path: Path, way: dict[str, Any]) -> None:
    options = OPTIONS | way | {"pattern": PATTERNS}
    llmprune.prune(folders["llama"], tmp_path / "dense", **options)
    reports = llmprune.prune(folders["llama"], tmp_path / "small", compressed=True, **options)
    for name, report in zip(NAMES, reports, strict=True):
        compress(tmp_path / "dense" / name, tmp_path / name)
        assert report.out == tmp_path / "small" / name
        for file in (tmp_path / name).glob("*.safetensors"):
            assert (report.out / file.name).read_bytes() == file.read_bytes(), name
    again = llmprune.prune(folders["llama"], tmp_path / "small", compressed=True, resume=True, **options)
    assert [report.zeros for report in again] == [report.zeros for report in reports]
    with pytest.raises(RecipeError, match="50% is compressed: give --compressed"):
        llmprune.prune(folders["llama"], tmp_path / "small", resume=True, **options)
    with pytest.raises(RecipeError, match="50% is not compressed: leave out --compressed"):
        llmprune.prune(folders["llama"], tmp_path / "dense", resume=True, compressed=True, **options)


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_pass_that_is_stopped_while_a_result_is_compressed_says_how_to_go_on(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    options: dict[str, Any] = OPTIONS | {"pattern": PATTERNS, "compressed": True}
    count = itertools.count(1)

    def stop(shards: Any) -> None:
        if next(count) == stopped:
            raise KeyboardInterrupt
        compress_shards(shards)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="run the same with --resume"):
        patch.setattr("llmprune.checkpoint.sink.compress_shards", stop)
        llmprune.prune(folders["llama"], tmp_path / "out", **options)
    assert sum((tmp_path / "out" / name).exists() for name in NAMES) == stopped - 1
    llmprune.prune(folders["llama"], tmp_path / "out", resume=True, **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)


def test_the_report_says_what_the_pass_ran_through(folders: dict[str, Path], tmp_path: Path) -> None:
    report, _ = llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%", "2:4"], **OPTIONS)
    assert report.one_pass == ["50%", "2:4"] and "through the dense model" in report.notes[0]
    assert {"load", "statistics", "forward", "solve", "write"} <= report.clock.seconds.keys()
    assert set(report.memory) == {f"model.layers.{block}" for block in range(tiny.BLOCKS)}
    assert all(used["host"] > 1 << 20 for used in report.memory.values())


def test_the_command_of_a_result_makes_that_result(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([{"input_ids": row} for row in OPTIONS["calibration"].tolist()]))
    options: dict[str, Any] = {"method": "wanda", "pattern": ["50%", "2:4"], "calibration": str(tmp_path / "ids.json")}
    for report in llmprune.prune(folders["llama"], tmp_path / "out", **options):
        words = shlex.split(runs.command_of(report.to_json(), out=str(tmp_path / "again")))
        monkeypatch.setattr(sys, "argv", words)
        cli.main()
        assert report.out is not None and same_weights(report.out, tmp_path / "again" / report.out.name)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"pattern": ["50%", "1:7"]}, PatternError, "not divisible by 7"),
        ({"pattern": ["50%", "0.5"]}, RecipeError, "none twice"),
        ({"pattern": []}, RecipeError, "at least one is needed"),
        ({"pattern": ["50%", "4:2"]}, PatternError, "keeps N of every M"),
        ({"comparison_group": "row"}, LlmpruneError, "has no meaning for 2:4"),
    ],
)
def test_what_cannot_be_had_for_all_is_refused_before_any_work(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    options: dict[str, Any] = {"pattern": ["50%", "2:4"], **OPTIONS, "method": "wanda"} | change
    with pytest.raises(kind, match=message):
        llmprune.prune(folders["llama"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dsnot"}, "dsnot needs to know more than norms"),
        ({"tune_epochs": 2}, "tune_epochs has each result see"),
        ({"true_sequential": True}, "true_sequential has each result see"),
        ({"preset": "balanced"}, "give each a pass of its own"),
    ],
)
def test_what_cannot_share_a_pass_is_refused_where_it_is_to(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        several.prune_several(folders["llama"], {tmp_path / "out": {"pattern": "50%"}}, **OPTIONS | change)
    assert not (tmp_path / "out").exists()


def test_a_model_folder_or_a_loaded_model_takes_no_several_results(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded: Any = tiny.load(folders["llama"])
    with pytest.raises(RecipeError, match="need a model on disk"):
        llmprune.prune(loaded, pattern=["50%", "2:4"], **OPTIONS)
    llmprune.prune(folders["llama"], tmp_path / "out", pattern="50%", **OPTIONS)
    with pytest.raises(CheckpointError, match="is a model folder"):
        llmprune.prune(folders["llama"], tmp_path / "out", pattern=["50%", "2:4"], **OPTIONS)
