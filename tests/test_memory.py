"""Memory that runs out: the same is done with less, to the same result; what is lost when nothing helps is one block."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading

import faults
import llmprune
import tiny
from llmprune import methods, solving
from llmprune.checkpoint import Sink
from llmprune.errors import ResourceError
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.model import Lanes, Resident
from llmprune.model.gradients import Tape
from llmprune.model.sites import Stage
from llmprune.model.walks import Walks
from llmprune.retrying import Retry, reliefs
from llmprune.statistics import CrossGram, Gram
from llmprune.storing import InMemory
from llmprune.thrift import SolvingError, Thrift

IDS = tiny.ids(4, 16)
OUT_OF_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "python": MemoryError(),
}


def run_out_of_memory(patch: pytest.MonkeyPatch, most: int, error: Exception) -> None:
    """Let the second block take no batch of more than `most` sequences."""
    plain = Lanes.run

    def run(lanes: Lanes, index: int, lane: int) -> Any:
        if index == 1 and lanes.sequences(lane) > most:
            raise error
        return plain(lanes, index, lane)

    patch.setattr(Lanes, "run", run)


def fail_where(patch: pytest.MonkeyPatch, owner: Any, name: str, why: Callable[..., bool]) -> None:
    """Let a function run out of memory where `why` says so of its arguments."""
    plain = getattr(owner, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if why(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*arguments, **options)

    patch.setattr(owner, name, failing)


def weights(folder: Path) -> dict[str, Any]:
    """Return the files of a model folder beside the report, which tells of what was tried again."""
    return {name: data for name, data in faults.content(folder).items() if name != "llmprune.json"}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    options: dict[str, Any] = {"calibration": tiny.ids(8, 16), "batch_size": 8}
    undisturbed = llmprune.prune(source, tmp_path / "whole", **options)
    run_out_of_memory(monkeypatch, 3, OUT_OF_MEMORY[kind])
    report = llmprune.prune(source, tmp_path / "out", **options)
    said = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("out of memory in model.layers.1: ") for line in said)
    assert [line.rpartition("; ")[2] for line in said] == [f"going on with {n} sequences a forward" for n in (4, 2)]
    assert report.retries == [f"out of memory in model.layers.1: going on with {n} sequences a forward" for n in (4, 2)]
    assert [(site.name, site.zeros) for site in report.sites] == [(s.name, s.zeros) for s in undisturbed.sites]
    one, two = tiny.tensors(tmp_path / "whole"), tiny.tensors(tmp_path / "out")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_memory_that_does_not_suffice_for_one_sequence_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    run_out_of_memory(monkeypatch, 0, OUT_OF_MEMORY["gpu"])
    with pytest.raises(ResourceError, match=r"^out of memory in model\.layers\.1: .*; 1 block kept in .*--resume"):
        llmprune.prune(source, out, calibration=IDS, batch_size=2)
    monkeypatch.undo()
    report = llmprune.prune(source, out, resume=True, calibration=IDS, batch_size=2)
    assert llmprune.inspect(out).verified
    assert report.retries == []  # what an earlier process gave up after its last block is no part of this result


def test_experts_that_do_not_fit_when_they_are_put_together_are_not_taken_for_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save(tiny.model("qwen3-moe"), tmp_path / "source")
    fail_where(monkeypatch, core_model_loading.MergeModulelist, "convert", lambda *_: True)
    with pytest.raises(ResourceError, match=r"^out of memory in model\.layers\.0: "):
        llmprune.prune(source, tmp_path / "out", calibration=IDS)


# Methods, each with an option under which rows depend on each other, or do not.
SOLVED: dict[str, dict[str, Any]] = {
    "sparsegpt": {"pattern": "2:4"},
    "sparsegpt in fast arithmetic": {"method_options": {"arithmetic": "fast"}},
    "admm": {"method_options": {"iterations": 10}},
    "sparseswaps": {},
    "ria": {},
    "wanda": {},
    "random": {"pattern": "2:4", "calibration": None},
    "magnitude": {"comparison_group": "row", "calibration": None},
}


@pytest.mark.parametrize("name", SOLVED)
def test_a_solve_that_does_not_fit_is_tried_again_with_the_same_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    options: dict[str, Any] = {"calibration": IDS, "method": name.split()[0], **SOLVED[name]}
    llmprune.prune(source, tmp_path / "whole", **options)
    apart = name in ("wanda", "random", "magnitude")  # methods whose rows are apart: those get 5 at a time and no more
    solved, method = set[int](), type(methods.get(options["method"]))

    def does_not_fit(solver: Any, weight_OI: Tensor, *rest: Any) -> bool:
        first = weight_OI.data_ptr() not in solved
        solved.add(weight_OI.data_ptr())
        return len(weight_OI) > 5 if apart else first

    fail_where(monkeypatch, method, "solve", does_not_fit)
    report = llmprune.prune(source, tmp_path / "out", **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    how = "fewer rows at a time, " if apart else ""
    note = f"out of memory, solved again {how}after freeing what can be computed again"
    noted = [site.name for site in report.sites if note in site.notes]
    assert len(noted) == len(report.sites) if apart else noted
    assert {f"{site}: {note}" for site in noted} == {record.getMessage() for record in caplog.records}
    assert note in (tmp_path / "out" / "llmprune.json").read_text()


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("true_sequential", [False, True])
def test_statistics_that_leave_no_room_to_solve_are_collected_in_more_runs_with_the_same_result(
    family: str, true_sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save(tiny.model(family), tmp_path / "source")
    options: dict[str, Any] = {"calibration": tiny.ids(8, 40), "true_sequential": true_sequential}
    llmprune.prune(source, tmp_path / "whole", **options)
    alive, plain = weakref.WeakSet[Gram](), Gram.__init__

    def count(gram: Gram, *arguments: Any) -> None:
        plain(gram, *arguments)
        alive.add(gram)

    monkeypatch.setattr(Gram, "__init__", count)
    most = 1 if family == "llama" else 2  # experts also have the pooled one
    fail_where(monkeypatch, SparseGPT, "solve", lambda *_: len(alive) > most)
    report = llmprune.prune(source, tmp_path / "out", **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    if family != "llama" or not true_sequential:
        assert report.retries
        assert all("collecting statistics of" in line for line in report.retries)
        assert set(report.retries) <= set(report.to_json()["notes"])


def test_batches_side_by_side_that_do_not_fit_are_run_once_for_each_matrix_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    options: dict[str, Any] = {"calibration": IDS, "true_sequential": True}
    llmprune.prune(source, tmp_path / "whole", **options)
    fail_where(monkeypatch, Walks, "_resume", lambda walks: walks._index == 1)
    report = llmprune.prune(source, tmp_path / "out", **options)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert report.retries == ["out of memory in model.layers.1: running each block once for every matrix"]


def test_a_dense_target_that_does_not_fit_is_one_line_and_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    options: dict[str, Any] = {"calibration": IDS, "true_sequential": True, "dense_target": 0.5}
    llmprune.prune(source, tmp_path / "whole", **options)
    fail_where(monkeypatch, Walks, "_resume", lambda walks: walks._index == 1)
    with pytest.raises(ResourceError, match=r"^out of memory in model\.layers\.1: .*--samples.*; 1 block kept in"):
        llmprune.prune(source, out, **options)
    monkeypatch.undo()
    llmprune.prune(source, out, resume=True, **options)
    assert faults.content(out) == faults.content(tmp_path / "whole")


def test_what_was_given_up_before_a_run_was_interrupted_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    options: dict[str, Any] = {"calibration": IDS, "true_sequential": True}
    fail_where(monkeypatch, Walks, "_resume", lambda walks: walks._index == 0)
    fail_where(monkeypatch, Lanes, "advance", lambda lanes, index: index == 1)
    with pytest.raises(ResourceError, match=r"out of memory in model\.layers\.1"):
        llmprune.prune(source, out, **options)
    monkeypatch.undo()
    report = llmprune.prune(source, out, resume=True, **options)
    assert report.retries[0] == "out of memory in model.layers.0: running each block once for every matrix"


@pytest.mark.parametrize("in_place", [False, True])
def test_memory_that_runs_out_in_the_middle_of_a_block_leaves_one_report_on_each_matrix(
    in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    undisturbed = llmprune.prune(source, tmp_path / "whole", calibration=IDS)
    plain, asked = solving.prune_matrix, list[str]()

    def prune_matrix(name: str, *rest: Any) -> Any:
        asked.append(name)
        if len(asked) == 3:
            raise MemoryError
        return plain(name, *rest)

    monkeypatch.setattr("llmprune.branch.prune_matrix", prune_matrix)
    if in_place:
        model = tiny.load(source)
        report = llmprune.prune(model, calibration=IDS)
        model.save_pretrained(out)
        (out / "llmprune.json").write_text(json.dumps(report.to_json()))
    else:
        report = llmprune.prune(source, out, calibration=IDS)
    assert all(name.startswith("model.layers.0.") for name in asked[:3]) and len(report.retries) == 1
    assert [(site.name, site.zeros) for site in report.sites] == [(s.name, s.zeros) for s in undisturbed.sites]
    assert llmprune.inspect(out).verified
    one, two = tiny.tensors(tmp_path / "whole"), tiny.tensors(out)
    assert all(tiny.same_bytes(one[name], two[name]) for name in one)


def test_a_backward_pass_that_does_not_fit_is_not_tried_with_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes one sequence at a time anyway."""
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    fail_where(monkeypatch, Tape, "_back", lambda *_: True)
    with pytest.raises(ResourceError, match=r"^out of memory in the backward pass: .*--samples"):
        llmprune.prune(source, tmp_path / "out", method="taylor", calibration=IDS, batch_size=4)
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_solve_that_never_fits_names_its_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    fail_where(monkeypatch, SparseGPT, "solve", lambda *_: True)
    with pytest.raises(ResourceError, match=r"out of memory in model\.layers\.0\.\S+\.weight: "):
        llmprune.prune(source, tmp_path / "out", calibration=IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_head_that_is_tied_to_the_embedding_is_dense_again_before_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is solved, and memory runs out while it is written: all before it runs on the embedding as it was."""
    source = tiny.save(tiny.model("llama-tied"), tmp_path / "source")
    options: dict[str, Any] = {"calibration": IDS, "batch_size": 2, "include": "lm_head.weight"}
    undisturbed = llmprune.prune(source, tmp_path / "whole", **options)
    failures = iter([True])
    fail_where(monkeypatch, Sink, "write", lambda sink, name, tensor: "embed" in name and next(failures, False))
    report = llmprune.prune(source, tmp_path / "out", **options)
    assert report.retries == ["out of memory in lm_head: going on with 1 sequences a forward"]
    assert [site.name for site in report.sites][-1] == "lm_head.weight"
    assert report.sites[-1].error == pytest.approx(undisturbed.sites[-1].error, rel=1e-3)  # none if it was pruned twice
    assert llmprune.inspect(tmp_path / "out").verified
    one, two = tiny.tensors(tmp_path / "whole"), tiny.tensors(tmp_path / "out")
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


def matrices(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_loaded_model_that_runs_out_of_memory_goes_on_with_smaller_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, model = tiny.model("llama"), tiny.model("llama")
    options: dict[str, Any] = {"calibration": IDS, "batch_size": 4}
    undisturbed = llmprune.prune(whole, **options)
    run_out_of_memory(monkeypatch, 1, OUT_OF_MEMORY["gpu"])
    report = llmprune.prune(model, **options)
    assert len(report.retries) == 2
    assert [(site.name, site.zeros) for site in report.sites] == [(s.name, s.zeros) for s in undisturbed.sites]
    one, two = matrices(whole), matrices(model)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize("dense_target", [0.0, 0.5])
def test_a_loaded_model_that_cannot_be_finished_has_no_block_that_is_pruned_in_part(
    dense_target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("llama")
    dense = matrices(model)
    plain, done = solving.prune_matrix, list[str]()

    def prune_matrix(name: str, *rest: Any) -> Any:
        if "layers.1" in name and name.endswith("down_proj.weight"):
            raise OUT_OF_MEMORY["cpu"]
        done.append(name)
        return plain(name, *rest)

    monkeypatch.setattr("llmprune.branch.prune_matrix", prune_matrix)
    with pytest.raises(ResourceError, match=r"out of memory in model\.layers\.1\.mlp\.down_proj\.weight"):
        llmprune.prune(model, calibration=IDS, true_sequential=True, dense_target=dense_target)
    assert any("layers.1" in name for name in done)
    now = matrices(model)
    changed = {name.split(".")[2] for name in now if not torch.equal(now[name], dense[name])}
    assert changed == {"0"}


@pytest.mark.parametrize("once", [False, True])
def test_a_loaded_model_whose_dense_blocks_are_gone_is_not_run_again(once: bool) -> None:
    report: Any = SimpleNamespace(sites=[], tuning=[])
    store, stage = InMemory(Resident(tiny.model("llama")), report, once), Stage("a block", torch.nn.Identity())
    assert store.go_back()
    store.keep(stage, [])
    assert store.go_back() is not once


def test_a_gpu_that_has_no_room_for_a_solve_leaves_it_to_the_host_when_nothing_else_is_left() -> None:
    """Without a GPU: the steps, and that all of a statistic moves. That the host solves is what all other tests show."""
    thrift: Thrift = Thrift()
    store: Any = None
    steps = [thrift.give_up(SolvingError("no room"), store, has_gpu=True) for _ in range(2)]
    assert steps == ["solving on the host what the GPU has no room for", None]
    assert Thrift().give_up(SolvingError("no room"), store, has_gpu=False) is None

    moved = list[torch.device]()
    statistic = SimpleNamespace(device=torch.device("cuda"), move=moved.append)
    assert len(reliefs(statistic, on_host=False)) == 1
    retry = Retry("a site", False, torch.Generator(), reliefs(statistic, on_host=True))

    def solve(rows_OI: Tensor) -> str:
        if not moved:
            raise OUT_OF_MEMORY["gpu"]
        return "solved"

    assert list(retry.solved(torch.ones(2, 2), solve)) == ["solved"]
    assert moved == [torch.device("cpu")]
    assert retry.notes[-1] == "out of memory, solved again on the host"

    gram = CrossGram(4, torch.device("cpu"))
    gram.add(torch.randn(8, 4), 1, torch.randn(8, 4))
    gram.factor(0.01)
    gram.move(torch.device("meta"))
    held = [value for value in vars(gram).values() if isinstance(value, Tensor)]
    assert len(held) == 2 and all(value.is_meta for value in held)
    assert not gram._factors
