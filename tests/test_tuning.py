"""Block tuning: nearer to the dense block on sequences it has not seen, on the same mask, or nothing at all."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmprune
import tiny
from llmprune.errors import RecipeError
from llmprune.model.function import BlockFunction
from llmprune.model.sites import Site, Stage
from llmprune.report import Report
from llmprune.storing import InMemory
from llmprune.tuning import BlockTuning, sequences_at_once

IDS = tiny.ids(20, 48)
TUNED: dict[str, Any] = {
    "calibration": IDS,
    "tune_epochs": 3,
    "tune_rate": 0.05,
    "true_sequential": True,
    "dense_target": 0.5,
}
PLAIN = {name: value for name, value in TUNED.items() if not name.startswith("tune")}


def prune(source: Path, out: Path, **options: Any) -> Report:
    return llmprune.prune(source, out, **{"calibration": IDS} | options)


def hidden(model: Any, block: int, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[block + 1]
    return found.double()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "gemma2", "qwen3-moe", "mixtral", "gpt-oss"])
def test_blocks_come_nearer_to_the_dense_ones_on_the_same_mask(family: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model(family), tmp_path / "source")
    report = prune(source, tmp_path / "out", **TUNED)
    dense, pruned = tiny.tensors(source), tiny.tensors(tmp_path / "out")
    assert len(report.tuning) == report.blocks and report.tuning[0].kept
    assert all(tuned.after < tuned.before if tuned.kept else tuned.after == tuned.before for tuned in report.tuning)
    changed = {name for name in dense if not tiny.same_bytes(dense[name], pruned[name])}
    vectors = {name for name in changed if dense[name].ndim == 1}
    assert vectors == {name for tuned in report.tuning for name in tuned.vectors} and vectors
    for name in changed - vectors:
        assert float((pruned[name] == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
        assert not pruned[name][pruned[name] == 0].signbit().any()
    assert not any("router" in name or name.endswith("gate.weight") for name in changed)
    assert sum(int((pruned[name] == 0).sum()) for name in changed - vectors) == report.zeros
    found = llmprune.inspect(tmp_path / "out")
    assert found.verified, found.faults


def test_the_report_tells_the_error_on_the_tenth_that_was_held_out(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    first = prune(source, tmp_path / "out", **TUNED).tuning[0]
    prune(source, tmp_path / "plain", **PLAIN, batch_size=1)
    target = hidden(tiny.load(source), 0, IDS)
    for folder, told in (("plain", first.before), ("out", first.after)):
        output = hidden(tiny.load(tmp_path / folder), 0, IDS)
        change, whole = (output - target).square().sum((1, 2)), target.square().sum((1, 2))
        errors = [(change[[a, b]].sum() / whole[[a, b]].sum()) for a, b in itertools.combinations(range(len(IDS)), 2)]
        assert min(abs(float(error) - told) for error in errors) < 1e-5 * told


def test_no_step_sees_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped, judged = dict[BlockFunction, set[int]](), dict[BlockFunction, set[int]]()
    gradients, change = BlockFunction.gradients, BlockFunction.change

    def step(block: BlockFunction, batches: Sequence[int], *rest: Any) -> Any:
        stepped.setdefault(block, set()).update(batches)
        return gradients(block, batches, *rest)

    def judge(block: BlockFunction, batches: Sequence[int], *rest: Any) -> Any:
        judged.setdefault(block, set(batches))  # the first look is at what is held out, with the weights from before
        return change(block, batches, *rest)

    monkeypatch.setattr(BlockFunction, "gradients", step)
    monkeypatch.setattr(BlockFunction, "change", judge)
    llmprune.prune(tiny.model("llama"), **TUNED, batch_size=1)
    assert len(judged) == tiny.BLOCKS and all(len(held_out) == 2 for held_out in judged.values())
    assert all(stepped[block] == set(range(len(IDS))) - held_out for block, held_out in judged.items())


def test_old_weights_stay_where_nothing_is_gained(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    report = prune(source, tmp_path / "out", **TUNED | {"tune_rate": 1e6})
    prune(source, tmp_path / "plain", **PLAIN, batch_size=1)
    assert [(tuned.kept, tuned.epochs, tuned.vectors) for tuned in report.tuning] == [(False, 0, ())] * report.blocks
    assert all(tuned.after == tuned.before > 0 for tuned in report.tuning)
    plain, out = tiny.tensors(tmp_path / "plain"), tiny.tensors(tmp_path / "out")
    assert all(tiny.same_bytes(plain[name], out[name]) for name in plain)
    assert "tuned         0 of 3 blocks" in str(report)


def test_the_seed_decides_all_bytes(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(source, tmp_path / name, **TUNED, seed=seed)
    a, b, c = (tiny.tensors(tmp_path / name) for name in "abc")
    assert all(tiny.same_bytes(a[name], b[name]) for name in a)
    assert not all(tiny.same_bytes(a[name], c[name]) for name in a)


def test_a_model_in_memory_is_tuned_to_the_same_weights(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    report = prune(source, tmp_path / "out", **TUNED)
    model = tiny.load(source)
    resident = llmprune.prune(model, **TUNED)
    assert resident.tuning == report.tuning
    written = tiny.load(tmp_path / "out").state_dict()
    assert all(tiny.same_bytes(value, written[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_loaded_model_whose_tuned_block_is_not_kept_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("opt")  # which has biases too
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = set[int]()

    def interrupted(store: InMemory, stage: Stage, sites: list[Site]) -> None:
        changed.update(p.ndim for name, p in stage.module.named_parameters(stage.name) if not p.equal(dense[name]))
        raise KeyboardInterrupt

    monkeypatch.setattr(InMemory, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(model, **TUNED)
    assert changed == {1, 2}
    assert all(tiny.same_bytes(tensor, dense[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_tuned_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama", dtype), tmp_path / "source")
    report = prune(source, tmp_path / "out", **TUNED, pattern="2:4")
    assert any(tuned.kept for tuned in report.tuning)
    pruned = tiny.tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in pruned.values()} == {dtype}
    assert all(int((pruned[site.name] == 0).sum()) == site.zeros for site in report.sites)
    assert llmprune.inspect(tmp_path / "out").verified


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "dsnot"])
def test_any_method_that_sees_inputs_can_be_tuned(method: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    for sequential in (False, True):
        options = {"method": method, "true_sequential": sequential, "tune_epochs": 2, "tune_rate": 0.05}
        report = prune(source, tmp_path / f"out-{sequential}", **options)
        assert report.tuning[0].kept


def test_a_block_without_sites_is_left_alone(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    report = prune(source, tmp_path / "out", **TUNED, exclude="model.layers.0.*", include="lm_head.weight")
    assert [tuned.block for tuned in report.tuning] == ["model.layers.1", "model.layers.2"]
    dense, pruned = tiny.tensors(source), tiny.tensors(tmp_path / "out")
    first = [name for name in dense if name.startswith("model.layers.0.")]
    assert first and all(tiny.same_bytes(dense[name], pruned[name]) for name in first)


def test_matrices_that_were_not_pruned_stay_as_they_are(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    prune(source, tmp_path / "out", **TUNED, exclude="*.mlp.*")
    dense, pruned = tiny.tensors(source), tiny.tensors(tmp_path / "out")
    assert all(tiny.same_bytes(dense[name], pruned[name]) for name in dense if ".mlp." in name)


def test_a_report_lists_what_was_tuned(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    report = prune(source, tmp_path / "out", **TUNED)
    told = json.loads((tmp_path / "out" / "llmprune.json").read_text())["tuning"]
    assert [BlockTuning.from_json(tuned) for tuned in told] == report.tuning
    assert [tuned["kept"] for tuned in told] == [tuned.kept for tuned in report.tuning]
    assert "model.layers.0.input_layernorm.weight" in told[0]["vectors"]
    kept = sum(tuned.kept for tuned in report.tuning)
    assert f"tuned         {kept} of 3 blocks" in str(report)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tune_epochs": -1}, "tune_epochs must be a whole number of at least 0, not -1"),
        ({"tune_epochs": 1.5}, "tune_epochs must be a whole number"),
        ({"tune_epochs": 1, "tune_rate": 0}, "tune_rate must be a number above 0, not 0"),
        ({"tune_epochs": 1, "tune_rate": float("nan")}, "tune_rate must be a number above 0"),
        ({"tune_epochs": 1, "method": "magnitude"}, "magnitude needs no calibration: leave out tune_epochs"),
        ({"tune_epochs": 1, "batch_size": 20}, "tune_epochs holds out a tenth of the batches"),
        ({"tune_epochs": 1, "samples": 1}, "a tenth of the samples: ask for more of them, or tune_epochs 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    with pytest.raises(RecipeError, match=says):
        prune(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("most", "sequences", "at_once"), [(1, 128, 1), (50, 128, 4), (50, 20, 2), (50, 5, 1)])
def test_a_step_leaves_something_to_hold_out(most: int, sequences: int, at_once: int) -> None:
    assert sequences_at_once(most, sequences) == at_once
