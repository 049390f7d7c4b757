"""A sparsity shared out over the sites: exact in all, by costs that are what they say, through the real program."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

import faults
import llmprune
import tiny
from llmprune import methods, preview
from llmprune.allocation import Curve, Measured, Part
from llmprune.budget import dense
from llmprune.budget.curves import Loss, Trials, cut_short, losses, sampled
from llmprune.budget.dense import _row_levels
from llmprune.budget.outliers import block_shares, outlier_share
from llmprune.checkpoint import Sink
from llmprune.errors import PatternError, RecipeError, UnsupportedModelError
from llmprune.model import Lanes, Resident
from llmprune.model.gradients import Tape
from llmprune.model.groups import Group
from llmprune.model.sites import sites_of
from llmprune.patterns import Count, Stacked
from llmprune.planning import parts_of
from llmprune.recipe import Recipe
from llmprune.solving import prune_matrix
from llmprune.statistics import Gram

CPU = torch.device("cpu")
IDS = tiny.ids(4, 16)
WAYS = ["owl", "error", "fisher"]


def zeros(folder: Path) -> int:
    return sum(int((tensor == 0).sum()) for tensor in tiny.tensors(folder).values() if tensor.ndim > 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model("llama"), tmp_path_factory.mktemp("budget") / "llama")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", ["37%", "61.7%"])
def test_the_zeros_of_all_sites_are_exact(way: str, pattern: str, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = llmprune.prune(llama, out, method="admm", pattern=pattern, calibration=IDS, allocation=way)
    sparsity = float(pattern[:-1]) / 100
    assert report.zeros == zeros(out) == int(report.site_parameters * sparsity)
    shares = {site.name: site.sparsity for site in report.sites}
    assert len(set(shares.values())) > 3 and all(abs(share - sparsity) < 0.151 for share in shares.values())
    told = json.loads((out / "llmprune.json").read_text())["allocation"]
    assert (told["by"], told["sequences"]) == (way, 4)
    assert {name: entry["sparsity"] for name, entry in told["sites"].items()} == shares
    assert all((len(entry.get("curve", [])) == 2) == (way != "owl") for entry in told["sites"].values())
    assert llmprune.inspect(out).verified


@pytest.mark.parametrize("method", ["magnitude", "ria", "sparsegpt", "sparseswaps", "wanda"])
@pytest.mark.parametrize("group", [None, "row"])
def test_every_method_takes_an_allocation(method: str, group: str | None) -> None:
    made = tiny.model("llama")
    report = llmprune.prune(
        made, method=method, pattern="50%", calibration=IDS, allocation="error", comparison_group=group
    )
    assert report.zeros == report.site_parameters // 2
    assert sum(int((made.get_parameter(site.name) == 0).sum()) for site in report.sites) == report.zeros


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3-moe"])
def test_other_families_share_out_a_sparsity_by_the_loss(family: str) -> None:
    report = llmprune.prune(tiny.model(family), method="admm", pattern="55%", calibration=IDS, allocation="fisher")
    assert report.zeros == int(report.site_parameters * 0.55)


@pytest.mark.parametrize("way", ["error", "fisher"])
def test_an_expert_that_no_token_reached_keeps_the_asked_sparsity(way: str) -> None:
    one_token = torch.full((1, 3), 7)
    report = llmprune.prune(
        tiny.model("qwen3-moe"), method="admm", pattern="50%", calibration=one_token, allocation=way
    )
    assert report.allocation is not None and report.zeros == int(report.site_parameters * 0.5)
    unmeasured = {name for name, entry in report.allocation["sites"].items() if "curve" not in entry}
    assert unmeasured and all(report.allocation["sites"][name]["sparsity"] == 0.5 for name in unmeasured)


def test_streamed_and_in_place_agree(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "admm", "pattern": "60%", "calibration": IDS, "allocation": "fisher"}
    llmprune.prune(llama, tmp_path / "out", **options)
    made = tiny.load(llama)
    llmprune.prune(made, **options)
    for name, tensor in tiny.tensors(tmp_path / "out").items():
        assert torch.equal(tensor, made.get_parameter(name).data), name


def fisher_of(made: Any) -> dict[str, torch.Tensor]:
    """Return F_o = E[(dL/dy_o)²] of every site, by its name."""
    host = Resident(made)
    sites = {block.name: sites_of(block) for block in host.blocks}
    with Lanes(made, [*host.blocks, host.head], [row[None] for row in IDS], CPU, host.device_of) as lanes:
        tape = Tape(lanes, of_weights=False, labels="sampled", seed=0)
        for index in range(len(host.blocks) - 1):
            tape.forward(index)
        return {
            site.name: gradient.square_O / IDS.numel()
            for _, found in tape.backward(host, len(host.blocks) - 1, sites)
            for site, gradient in found.items()
        }


@pytest.mark.parametrize(("pattern", "group"), [("50%", None), ("50%", "row"), ("2:4", None)])
def test_rows_compete_by_what_their_errors_cost(
    pattern: str, group: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = tiny.model("llama")
    for block in made.model.layers:
        block.mlp.down_proj.weight.data[:, ::2] *= 8  # so that errors in every second output of up_proj cost more
    met: dict[str, Any] = {}

    def see(name: str, method: Any, weight_OI: torch.Tensor, statistic: Any, pattern: Any, *rest: Any) -> Any:
        met[name] = pattern
        return prune_matrix(name, method, weight_OI, statistic, pattern, *rest)

    monkeypatch.setattr("llmprune.branch.prune_matrix", see)
    options: dict[str, Any] = {"pattern": pattern, "calibration": IDS, "comparison_group": group}
    options |= {"preset": "balanced"} if pattern == "2:4" else {"method": "admm", "allocation": "fisher"}
    fisher = fisher_of(made) if pattern == "50%" and group is None else {}
    report = llmprune.prune(made, **options)
    levels = {name: getattr(pattern, "row_levels", b"") for name, pattern in met.items()}
    if not fisher:
        assert set(levels.values()) == {b""}
        return
    for name, square_O in fisher.items():
        scale_O = (square_O / square_O.median()) ** (0.25 * IDS.numel() / (IDS.numel() + 16))
        count = Count(0, 0, "layer", levels[name] or bytes([128] * len(square_O)))
        torch.testing.assert_close(count.row_scales, scale_O.clamp(1 / 8, 8), rtol=0.045, atol=0)  # half of an eighth
    assert len(set(levels["model.layers.0.mlp.up_proj.weight"])) > 8
    assert report.allocation is not None and all("rows" not in site for site in report.allocation["sites"].values())
    assert "rows" not in report.allocation


def test_rows_without_gradients_do_not_decide_what_the_others_count_for() -> None:
    square_O = torch.cat([torch.zeros(55), torch.logspace(-8, -2, 45)])
    scale_O = Count(0, 0, "layer", _row_levels(square_O, 1 << 20)).row_scales
    assert scale_O[:55].eq(1 / 8).all()  # errors in these cost nothing
    torch.testing.assert_close(scale_O[55:], (square_O[55:] / 1e-5) ** 0.25, rtol=0.045, atol=0)
    assert _row_levels(torch.zeros(8), 5) == b""


@pytest.mark.parametrize(("tokens", "octaves"), [(1, 1.5 / 17), (16, 1.5 / 2), (1 << 20, 1.5)])
def test_rows_of_an_expert_with_few_tokens_are_nearly_alike(tokens: int, octaves: float) -> None:
    scale_O = Count(0, 0, "layer", _row_levels(torch.tensor([1.0, 1.0, 64.0]), tokens)).row_scales
    assert scale_O.log2().tolist() == pytest.approx([0, 0, octaves], abs=1 / 16)


def test_costs_by_the_loss_are_fisher_times_error() -> None:
    """½ Σ_o F_o E[Δy_o²], with the errors of each solution on inputs that plain hooks on the whole model have seen."""
    made: Any = tiny.model("llama")
    options: dict[str, Any] = {"method": "admm", "pattern": "50%", "calibration": IDS, "allocation": "fisher"}
    report = llmprune.prune(tiny.model("llama"), **options)
    fisher = fisher_of(made)
    assert report.allocation is not None
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"):
        module, seen = made.get_submodule(name.removesuffix(".weight")), list[torch.Tensor]()
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        gram = Gram(module.in_features, CPU)
        for row in IDS:
            tiny.logits(made, row[None])
            gram.add(seen[-1], 1)
        handle.remove()
        for share, cost in report.allocation["sites"][name]["curve"]:
            size = module.weight.numel()
            pattern = Count(int(size * share), size)
            method = cut_short(methods.get("admm"))
            change_OI = (
                module.weight.data - method.solve(module.weight.data, gram, pattern, torch.Generator()).weight_OI
            )
            error_O = (torch.cat(seen) @ change_OI.T).square().mean(0)
            assert cost == pytest.approx(float(fisher[name] @ error_O) / 2, rel=1e-2)


def test_losses_are_those_of_each_solution_by_itself() -> None:
    made: Any = tiny.model("llama")
    block = Resident(made).blocks[0]
    sites = [site for site in sites_of(block) if site.tensor.split(".")[-2] in ("q_proj", "k_proj")]
    x_TI = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    gram = Gram(64, CPU)
    gram.add(x_TI, 2)
    method = methods.get("admm")
    group = Group(sites, statistic=gram)
    weight = {site: made.get_parameter(site.tensor).data for site in sites}
    (found,) = losses([group], weight.__getitem__, [Trials(lambda site: (method, Count), (0.4, 0.6))], 0)
    assert group.statistic is None
    for site in sites:
        loss: Loss = found[site.name]
        assert loss.energy == pytest.approx(float((x_TI @ weight[site].T).square().sum()), rel=1e-4)
        for point, share in enumerate((0.4, 0.6)):
            size = weight[site].numel()
            pattern = Count(int(size * share), size)
            alone = cut_short(method).solve(weight[site], gram, pattern, torch.Generator())
            expected_O = (x_TI @ (weight[site] - alone.weight_OI).T).square().sum(0)
            torch.testing.assert_close(loss.error_PR[point], expected_O, rtol=1e-3, atol=1e-3)


def test_a_tall_matrix_is_told_from_some_of_its_rows() -> None:
    assert sampled(torch.arange(256)).tolist() == list(range(256))
    assert sampled(torch.arange(600)).tolist() == list(range(0, 600, 3))
    generator = torch.Generator().manual_seed(0)
    (site, *_) = sites_of(Resident(tiny.model("llama")).blocks[0])
    weight_OI, x_TI = torch.randn(4096, 64, generator=generator), torch.randn(200, 64, generator=generator)
    gram = Gram(64, CPU)
    gram.add(x_TI, 1)
    method = methods.get("sparsegpt")
    trials = Trials(lambda _: (method, Count), (0.5,))
    (found,) = losses([Group([site], statistic=gram)], lambda _: weight_OI, [trials], 0)
    (loss,) = found.values()
    assert loss.error_PR.shape == (1, 241)  # every 17th
    whole = method.solve(weight_OI, gram, Count(weight_OI.numel() // 2, weight_OI.numel()), generator)
    energy = float((x_TI @ weight_OI.T).square().sum())
    error = float((x_TI @ (weight_OI - whole.weight_OI).T).square().sum()) / energy
    assert float(loss.error_PR.sum()) / loss.energy == pytest.approx(error, rel=0.05)


def test_stacked_patterns_hold_each_for_its_own_rows() -> None:
    score_OI = torch.randn(10, 256, generator=torch.Generator().manual_seed(0))
    parts = Count(100, 4 * 256, "row"), Count(700, 6 * 256, "block")
    stacked = Stacked(parts, (4, 6))
    keep_OI = stacked.keep(score_OI)
    stacked.check(keep_OI)
    assert torch.equal(keep_OI, torch.cat([parts[0].keep(score_OI[:4]), parts[1].keep(score_OI[4:])]))
    assert torch.equal(keep_OI[4:, :128], stacked.keep_block(score_OI[:, :128], 0)[4:])
    with pytest.raises(PatternError, match="asked for 100 zeros"):
        stacked.check(~keep_OI)


def test_a_method_cut_short_keeps_its_other_options() -> None:
    assert cut_short(methods.get("admm", {"damp": 0.5})) == methods.get(
        "admm", {"damp": 0.5, "iterations": 3, "stages": 1, "refit": 1}
    )
    assert cut_short(methods.get("wanda")) == methods.get("wanda")


def test_outliers_are_counted_over_a_block() -> None:
    made: Any = tiny.model("llama")
    site = sites_of(Resident(made).blocks[0])[0]
    weight_OI = torch.ones(64, 64)
    weight_OI[0, :32] = 100
    gram = Gram.from_matrix(torch.eye(64))
    assert outlier_share([Group([site], statistic=gram)], lambda site: weight_OI) == 32 / 64**2


def test_blocks_with_more_outliers_keep_more() -> None:
    shares = block_shares({"a": 0.1, "b": 0.3, "c": 0.2}, {"a": 1, "b": 1, "c": 2}, 0.6, 0.15)
    assert shares == pytest.approx({"a": 0.675, "b": 0.525, "c": 0.6})
    assert sum(shares[name] * size for name, size in {"a": 1, "b": 1, "c": 2}.items()) == pytest.approx(0.6 * 4)
    assert block_shares({"a": 0.1, "b": 0.1}, {"a": 1, "b": 9}, 0.6, 0.15) == {"a": 0.6, "b": 0.6}


RESUMED: dict[str, dict[str, Any]] = {
    "error": {"method": "admm", "allocation": "error"},
    "fisher, dense target": {"preset": "balanced", "allocation": "fisher"},
    "owl, rows": {"method": "wanda", "allocation": "owl", "comparison_group": "row"},
    "taylor": {"method": "taylor"},
    "overrides": {
        "method": "admm",
        "overrides": {"*.down_proj.weight": {"pattern": "2:4"}, "*.q_proj.weight": {"method": "wanda"}},
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_an_interrupted_run_ends_in_the_same_bytes(name: str, llama: Path, tmp_path: Path) -> None:
    options = {"pattern": "60%", "calibration": IDS, **RESUMED[name]}
    whole = llmprune.prune(llama, tmp_path / "whole", **options)
    for stop_after in (1, 2) if "allocation" in options or "preset" in options else (1,):
        out, left = tmp_path / f"out-{stop_after}", iter(range(stop_after))
        finish = Sink.finish

        def finish_or_stop(sink: Sink, stage: str, record: dict[str, Any], left: Any = left, do: Any = finish) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            do(sink, stage, record)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Sink, "finish", finish_or_stop)
            llmprune.prune(llama, out, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dense.DensePass, "costs", None)  # what is kept is not paid for again
            resumed = llmprune.prune(llama, out, resume=True, **options)
        assert faults.content(out) == faults.content(tmp_path / "whole")
        assert resumed.allocation == whole.allocation
        assert [site.name for site in resumed.sites] == [site.name for site in whole.sites]


def test_what_is_kept_is_said_in_words(llama: Path, tmp_path: Path) -> None:
    def stop(sink: Sink, *rest: Any) -> None:
        raise KeyboardInterrupt

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(KeyboardInterrupt, match="the allocation of sparsity kept"),
    ):
        patch.setattr(Sink, "write", stop)
        llmprune.prune(llama, tmp_path / "out", method="admm", calibration=IDS, allocation="error")
    with pytest.raises(
        llmprune.errors.CheckpointError, match="an unfinished run \\(the allocation of sparsity done\\)"
    ):
        llmprune.prune(llama, tmp_path / "out", method="admm", calibration=IDS)


def test_stated_sparsities_are_kept_and_the_rest_has_its_own(llama: Path, tmp_path: Path) -> None:
    table = {"*.down_proj.weight": "40%", "model.layers.0.*": 0.25}
    for way in ("uniform", "error"):
        report = llmprune.prune(
            llama, tmp_path / way, method="admm", pattern="70%", calibration=IDS, allocation=way, sparsities=table
        )
        rest = zeros = 0
        for site in report.sites:
            size = site.shape[0] * site.shape[1]
            if "down_proj" in site.name:
                assert site.zeros == int(size * 0.4)
            elif "layers.0." in site.name:
                assert site.zeros == int(size * 0.25)
            else:
                rest, zeros = rest + size, zeros + site.zeros
                assert way == "error" or site.zeros == int(size * 0.7)
        assert way == "uniform" or zeros == int(rest * 0.7)
        assert llmprune.inspect(tmp_path / way).verified


def test_overrides_solve_sites_by_their_own_method(llama: Path) -> None:
    overrides = {
        "*.q_proj.weight": {"method": "magnitude", "pattern": "2:4"},
        "*.mlp.*": {"method": "wanda", "comparison_group": "row"},
        "*": {"method_options": {"damp": 0.1}},
    }
    options: dict[str, Any] = {"pattern": "50%", "calibration": IDS}
    mixed, admm, wanda = tiny.load(llama), tiny.load(llama), tiny.load(llama)
    report = llmprune.prune(mixed, method="admm", overrides=overrides, **options)
    llmprune.prune(admm, method="admm", method_options={"damp": 0.1}, **options)
    llmprune.prune(wanda, method="wanda", **options)
    first = {name: made.model.layers[0] for name, made in (("mixed", mixed), ("admm", admm), ("wanda", wanda))}
    q_OI = tiny.load(llama).model.layers[0].self_attn.q_proj.weight.data
    expected_OI = llmprune.solve(q_OI, method="magnitude", pattern="2:4").weight_OI
    assert torch.equal(first["mixed"].self_attn.q_proj.weight.data, expected_OI)
    assert torch.equal(first["mixed"].self_attn.k_proj.weight, first["admm"].self_attn.k_proj.weight)
    assert torch.equal(first["mixed"].mlp.gate_proj.weight, first["wanda"].mlp.gate_proj.weight)
    assert {site.pattern for site in report.sites} == {"2:4", "0.5"}
    assert report.recipe["overrides"]["*"] == {"method_options": {"damp": 0.1} | admm_options()}


def admm_options() -> dict[str, Any]:
    return {**Recipe.of({"method": "admm", "method_options": {"damp": 0.1}}).to_json()["method_options"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "fishr"}, "unknown allocation 'fishr': did you mean 'fisher'"),
        ({"allocation": "error", "pattern": "2:4"}, "allocation 'error' shares out a sparsity, 2:4 is the same"),
        ({"sparsities": {"*": "60%"}, "pattern": "2:4"}, "sparsities shares out a sparsity, 2:4 is the same"),
        ({"allocation": "owl", "comparison_group": "model", "method": "magnitude"}, "leave out allocation 'owl'"),
        ({"allocation_range": 0}, "allocation_range must be a number between 0 and 1, not 0"),
        ({"allocation_range": "wide"}, "allocation_range must be a number between 0 and 1, not 'wide'"),
        ({"sparsities": ["*"]}, "sparsities must map globs to values"),
        ({"sparsities": {"*": "2:4"}}, "sparsities '*': '2:4' is no sparsity such as 60%; overrides take N:M"),
        ({"sparsities": {"*": 60}}, "sparsities '*': pattern '60': the sparsity must lie between 0 and 1"),
        ({"overrides": {"*": "wanda"}}, "overrides '*': must map options such as 'method' to values, not 'wanda'"),
        ({"overrides": {"*": {"sparsity": 1}}}, "overrides '*': cannot set 'sparsity' for some sites: known: "),
        ({"overrides": {"*": {"patern": "50%"}}}, "cannot set 'patern' for some sites: did you mean 'pattern'"),
        ({"overrides": {"*": {"method": "wnda"}}}, "overrides '*': unknown method 'wnda': did you mean 'wanda'"),
        ({"overrides": {"*": {"method_options": {"dmp": 1}}}}, "has no option 'dmp': did you mean 'damp'"),
        (
            {"method": "magnitude", "overrides": {"*": {"comparison_group": "model"}}},
            "overrides '*': comparison_group 'model' compares all matrices with each other: set it for the whole run",
        ),
        ({"overrides": {"*.q_prj.*": {"pattern": "2:4"}}}, "overrides '*.q_prj.*' matches nothing to prune: "),
        ({"sparsities": {"*.mlp.*": "60%"}, "exclude": "*.mlp.*"}, "sparsities '*.mlp.*' matches nothing to prune"),
        ({"method": "taylor", "true_sequential": True}, "taylor takes the dense model's gradients"),
        ({"method": "taylor", "allocation": "fisher"}, "taylor from gradients: use owl"),
        ({"method": "taylor", "overrides": {"*": {"method": "wanda"}}}, "no overrides with methods that see inputs"),
    ],
)
def test_contradictions_are_refused_before_work(
    options: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, PatternError)) as error:
        llmprune.prune(llama, tmp_path / "out", **{"calibration": IDS, **options})
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_presets_share_out_what_can_be_shared_out() -> None:
    assert Recipe.of({"preset": "balanced", "pattern": "60%"}).allocation == "fisher"
    assert Recipe.of({"preset": "balanced", "pattern": "2:4"}).allocation == "uniform"
    assert Recipe.of({"preset": "balanced", "allocation": "uniform"}).allocation == "uniform"
    with pytest.raises(RecipeError, match="allocation 'fisher' shares out a sparsity"):
        Recipe.of({"preset": "balanced", "pattern": "2:4", "allocation": "fisher"})


def test_taylor_prunes_by_the_dense_models_gradients(llama: Path) -> None:
    made, whole = tiny.load(llama), tiny.load(llama)
    report = llmprune.prune(made, method="taylor", pattern="50%", calibration=IDS)
    squares = {site.name: torch.zeros(site.shape) for site in report.sites}
    for row in IDS:
        whole.zero_grad()
        logits = whole(input_ids=row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        for name, square_OI in squares.items():
            square_OI += whole.get_parameter(name).grad.square()
    for name, square_OI in squares.items():
        dense_OI = whole.get_parameter(name).data
        score_OI = dense_OI.square() * square_OI
        kept_OI = made.get_parameter(name) != 0
        assert torch.equal(made.get_parameter(name)[kept_OI], dense_OI[kept_OI])
        assert int(kept_OI.sum()) == kept_OI.numel() - kept_OI.numel() // 2
        agreement = (kept_OI == Count(kept_OI.numel() // 2, kept_OI.numel()).keep(score_OI)).float().mean()
        assert agreement > 0.999  # rounding may exchange neighbours
    assert {site.error_norm for site in report.sites} == {"gradient"}


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe", "dbrx"])
def test_taylor_prunes_other_families(family: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model(family), tmp_path / "source")
    report = llmprune.prune(source, tmp_path / "out", method="taylor", pattern="2:4", calibration=IDS)
    assert llmprune.inspect(tmp_path / "out").verified and report.zeros == report.site_parameters // 2


def test_gradients_of_fewer_sequences_are_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.reverse.most_kept", lambda rows, *rest: 2)
    report = llmprune.prune(tiny.load(llama), method="taylor", calibration=IDS)
    assert "gradients are those of 2 sequences, to bound their memory" in report.notes


@pytest.mark.parametrize("options", [{"method": "taylor"}, {"preset": "balanced"}], ids=str)
def test_a_plan_tells_what_the_dense_passes_take(options: dict[str, Any], llama: Path) -> None:
    told = preview.plan(llama, pattern="60%", samples=4, length=16, **options)
    assert {"gradients" if "method" in options else "allocation"} <= {part.name for part in told.time}


def test_a_cost_of_the_report_is_the_curves_value() -> None:
    report = llmprune.prune(tiny.model("llama"), method="admm", pattern="50%", calibration=IDS, allocation="error")
    assert report.allocation is not None
    for entry in report.allocation["sites"].values():
        shares, costs = zip(*entry["curve"], strict=True)
        assert entry["cost"] == pytest.approx(float(Curve(shares, costs)(np.array([entry["sparsity"]]))[0]))


def measured(folder: Path, out: Path, **options: Any) -> Path:
    data = [row.tolist() for row in tiny.ids(3, 16)]
    llmprune.sensitivity(folder, out, sparsities=(0.4, 0.6, 0.8), data=data, windows=2, **options)
    return out / "sensitivity.json"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_a_measured_file_shares_out_a_sparsity(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family), tmp_path / family)
    file = measured(folder, tmp_path / "sensitivity")
    told = json.loads(file.read_text())
    for cell in told["cells"]:  # let the first block be the one that matters
        cell["kl_divergence"] *= 1e3 if (cell["axis"], cell["part"]) == ("block", "0") else 1
    file.write_text(json.dumps(told))
    options: dict[str, Any] = {"method": "magnitude", "pattern": "61.7%", "allocation": str(file)}
    report = llmprune.prune(folder, tmp_path / "out", exclude="*.1.*attn*", **options)
    assert report.zeros == int(report.site_parameters * 0.617)
    shares = {site.name: site.sparsity for site in report.sites}
    firsts = [share for name, share in shares.items() if ".0." in name.partition(".experts")[0]]
    assert max(firsts) < 0.617 and max(shares.values()) < 0.768
    allocation = json.loads((tmp_path / "out" / "llmprune.json").read_text())["allocation"]
    assert (allocation["by"], allocation["model"]) == (str(file), str(folder))
    assert {name: entry["sparsity"] for name, entry in allocation["sites"].items()} == shares
    assert llmprune.inspect(tmp_path / "out").verified
    made = tiny.load(folder)
    in_place = llmprune.prune(made, exclude="*.1.*attn*", **options)
    assert {site.name: site.sparsity for site in in_place.sites} == shares


def test_costs_of_sites_sum_up_to_what_was_measured(llama: Path, tmp_path: Path) -> None:
    file = measured(llama, tmp_path)
    found = Measured.read(str(file))
    parts = parts_of(Resident(tiny.load(llama)))
    costs = found.costs(parts)
    assert found.shares == (0.4, 0.6, 0.8)
    cells = {(c["axis"], c["part"], c["sparsity"]): c["kl_divergence"] for c in json.loads(file.read_text())["cells"]}
    for at, share in enumerate(found.shares):
        blocks, kinds = dict.fromkeys(found.blocks, 0.0), dict.fromkeys(found.kinds, 0.0)
        for name, part in parts.items():
            blocks[part.block] += costs[name].costs[at]
            kinds[part.kind] += costs[name].costs[at]
        assert blocks == pytest.approx({part: cells["block", part, share] for part in blocks}, rel=1e-6)
        ratios = {kind: cost / cells["kind", kind, share] for kind, cost in kinds.items()}
        assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-6)


def test_experts_of_a_kind_share_its_cost_by_their_weights(tmp_path: Path) -> None:
    parts = {"a": Part("0", "up", 30), "b": Part("0", "up", 10), "c": Part("0", "q", 40), "d": Part("1", "q", 40)}
    found = Measured("x.json", "x", (0.5, 0.6), {"0": (3.0, 6.0), "1": (1.0, 2.0)}, {"up": (2.0, 4.0), "q": (2.0, 4.0)})
    costs = {name: curve.costs for name, curve in found.costs(parts).items()}
    expected = {"a": (1.5, 3.0), "b": (0.5, 1.0), "c": (1.0, 2.0), "d": (1.0, 2.0)}
    for name, cost in expected.items():
        assert costs[name] == pytest.approx(cost, rel=1e-3)


def a_cell(axis: str = "block", part: str = "0", sparsity: float = 0.5, kl: float = 0.1) -> dict[str, Any]:
    return {"axis": axis, "part": part, "sparsity": sparsity, "perplexity": 9.0, "kl_divergence": kl}


def a_file(*cells: dict[str, Any]) -> str:
    return json.dumps({"settings": {"model": "other/model"}, "dense": 9.0, "cells": list(cells)})


def a_grid(blocks: int, kinds: list[str]) -> str:
    parts = [("block", str(block)) for block in range(blocks)] + [("kind", kind) for kind in kinds]
    return a_file(*(a_cell(axis, part, share) for axis, part in parts for share in (0.5, 0.7)))


KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not what `llmprune sensitivity --out FOLDER` writes: give its sensitivity.json"),
        ("[1]", "is not what `llmprune sensitivity"),
        ('{"method": "wanda"}', "is not what `llmprune sensitivity"),
        (a_file(), "is not what `llmprune sensitivity"),
        (a_file(a_cell(kl=float("nan")), a_cell("kind", "q_proj")), "is not what `llmprune sensitivity"),
        (a_file(a_cell(), a_cell("kind", "q_proj", 0.6)), "is not what `llmprune sensitivity"),
        (a_file(a_cell(), a_cell("kind", "q_proj")), "fewer than two sparsities were measured"),
        (a_grid(tiny.BLOCKS + 1, KINDS), f"other/model: the file has block {tiny.BLOCKS}, the model does not"),
        (a_grid(tiny.BLOCKS - 1, KINDS), f"the model has block {tiny.BLOCKS - 1}, the file does not"),
        (a_grid(tiny.BLOCKS, KINDS[:-1]), "the model has kind down_proj, the file does not"),
    ],
)
def test_a_wrong_or_foreign_file_is_refused_before_work(
    content: str | None, message: str, llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sensitivity.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError) as error:
        llmprune.prune(llama, tmp_path / "out", calibration=IDS, allocation=file)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == (content is not None)


def test_a_measured_file_goes_with_no_nm(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="shares out a sparsity, 2:4 is the same everywhere"):
        llmprune.prune(llama, tmp_path / "out", pattern="2:4", allocation="sensitivity.json", calibration=IDS)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_accelerate_offloads_takes_an_allocation(way: str, llama: Path) -> None:
    plain, offloaded = tiny.load(llama), tiny.load(llama)
    options: dict[str, Any] = {"method": "sparsegpt", "pattern": "60%", "calibration": IDS, "allocation": way}
    llmprune.prune(plain, **options)
    cpu_offload(offloaded, execution_device=CPU)
    llmprune.prune(offloaded, **options)
    assert torch.equal(tiny.logits(offloaded, IDS), tiny.logits(plain, IDS))


def test_a_preset_on_an_offloaded_model_says_what_to_leave_out(llama: Path) -> None:
    offloaded = tiny.load(llama)
    cpu_offload(offloaded, execution_device=CPU)
    before = tiny.logits(offloaded, IDS)
    with pytest.raises(UnsupportedModelError, match=r"offloaded by accelerate.*dense_target=0, tune_epochs=0") as error:
        llmprune.prune(offloaded, preset="balanced", pattern="60%", calibration=IDS)
    assert "\n" not in str(error.value) and torch.equal(tiny.logits(offloaded, IDS), before)
    report = llmprune.prune(offloaded, preset="balanced", pattern="60%", calibration=IDS, dense_target=0)
    assert report.zeros == int(report.site_parameters * 0.6)
