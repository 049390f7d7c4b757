"""An interrupted run is continued to the same bytes, by the same run only, and nothing is discarded unasked."""

import os
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import faults
import llmprune
import tiny
from llmprune import solving
from llmprune.checkpoint import Sink
from llmprune.checkpoint.journal import Journal
from llmprune.errors import CheckpointError
from llmprune.model import Streamed
from llmprune.model.sites import Stage

IDS = tiny.ids(4, 16)
QUICK: dict[str, Any] = {"method": "magnitude"}


def interrupt_after(stages: int, patch: pytest.MonkeyPatch) -> None:
    """Let a run in this process end as Ctrl-C ends it, once that many stages are done."""
    finish, left = Sink.finish, iter(range(stages))

    def finish_or_stop(sink: Sink, stage: str, record: dict[str, Any]) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        finish(sink, stage, record)

    patch.setattr(Sink, "finish", finish_or_stop)


def interrupted(source: Path, out: Path, stages: int, **options: Any) -> Path:
    """Prune, and stop after that many stages; return OUT.partial."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(stages, patch)
        llmprune.prune(source, out, **options)
    return faults.partial_of(out)


# What a resumed run has to rebuild: hidden states, budgets over the model, rounding, tied and renamed weights.
RESUMED: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "sparsegpt": ("llama", torch.bfloat16, {"calibration": IDS}),
    "true sequential": ("llama", torch.float32, {"calibration": IDS, "true_sequential": True}),
    "dense target": ("llama", torch.float32, {"calibration": IDS, "true_sequential": True, "dense_target": 0.5}),
    "dense target, wider than stored": (
        "llama",
        torch.bfloat16,
        {"calibration": IDS, "true_sequential": True, "dense_target": 0.5, "dtype": "float32"},
    ),
    "dense target, experts": (
        "qwen3-moe",
        torch.float32,
        {"calibration": IDS, "true_sequential": True, "dense_target": 0.5},
    ),
    "tuned": (
        "llama",
        torch.float32,
        {"calibration": IDS, "true_sequential": True, "dense_target": 0.5, "tune_epochs": 2},
    ),
    "tuned, wider than stored": (
        "opt",
        torch.bfloat16,
        {"calibration": IDS, "method": "wanda", "tune_epochs": 2, "dtype": "float32"},
    ),
    "tuned, experts": ("qwen3-moe", torch.float32, {"calibration": IDS, "tune_epochs": 2}),
    "batches": ("qwen3", torch.float32, {"calibration": IDS, "batch_size": 3, "method": "wanda"}),
    "sliding and full attention, tied head": (
        "gemma2",
        torch.float32,
        {"calibration": IDS, "include": "lm_head.weight"},
    ),
    "transposed": ("gpt2", torch.float16, {"calibration": IDS, "pattern": "2:4"}),
    "biases": ("opt", torch.float32, {"calibration": IDS, "method": "wanda"}),
    "experts": ("qwen3-moe", torch.bfloat16, {"calibration": IDS}),
    "head": ("llama", torch.float32, {"calibration": IDS, "include": "lm_head.weight"}),
    "wider than stored": ("llama", torch.bfloat16, {"calibration": IDS, "dtype": "float32"}),
    "narrower than stored": ("llama", torch.float32, {"calibration": IDS, "dtype": "bfloat16"}),
    "random": ("llama", torch.float32, {"method": "random", "seed": 3}),
    "one budget": ("llama-tied", torch.float32, QUICK | {"comparison_group": "model", "include": "*"}),
    "shared out by the loss, rows too": ("llama", torch.float32, {"calibration": IDS, "preset": "balanced"}),
    "blocks left dense": ("llama", torch.float32, {"calibration": IDS, "exclude": "model.layers.0.*"}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_after_any_of_its_stages(name: str, tmp_path: Path) -> None:
    family, dtype, options = RESUMED[name]
    source = tiny.save(tiny.model(family, dtype), tmp_path / "source")
    report = llmprune.prune(source, tmp_path / "whole", **options)
    whole = faults.content(tmp_path / "whole")
    for done in range(1, report.blocks):
        out = tmp_path / f"out-{done}"
        interrupted(source, out, done, **options)
        resumed = llmprune.prune(source, out, resume=True, **options)
        assert faults.content(out) == whole
        assert [site.name for site in resumed.sites] == [site.name for site in report.sites]
        assert resumed.tuning == report.tuning


def test_a_run_that_is_resumed_does_not_solve_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    interrupted(source, tmp_path / "out", 2, calibration=IDS)
    solved: list[str] = []
    plain = solving.prune_matrix

    def record(name: str, *rest: Any) -> solving.Outcome:
        solved.append(name)
        return plain(name, *rest)

    monkeypatch.setattr("llmprune.branch.prune_matrix", record)
    llmprune.prune(source, tmp_path / "out", resume=True, calibration=IDS)
    assert {name.split(".")[2] for name in solved} == {"2"}


def test_what_was_done_is_neither_used_nor_lost_unasked(tmp_path: Path) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    left = faults.content(interrupted(source, out, 2, **QUICK))
    with pytest.raises(CheckpointError, match=r"unfinished run \(2 blocks done\).*--resume.*--overwrite"):
        llmprune.prune(source, out, **QUICK)
    assert faults.content(faults.partial_of(out)) == left
    llmprune.prune(source, out, overwrite=True, method="random")
    assert not faults.partial_of(out).exists()
    assert llmprune.inspect(out).verified


def test_there_need_not_be_anything_to_resume(tmp_path: Path) -> None:
    source = tiny.save(tiny.model("llama"), tmp_path / "source")
    llmprune.prune(source, tmp_path / "out", resume=True, **QUICK)
    assert llmprune.inspect(tmp_path / "out").verified
    with pytest.raises(CheckpointError, match="exists"):
        llmprune.prune(source, tmp_path / "out", resume=True, **QUICK)


def test_resuming_needs_no_space_for_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    interrupted(source, out, 2, **QUICK)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(CheckpointError, match="too little disk"):
        llmprune.prune(source, tmp_path / "other", **QUICK)
    llmprune.prune(source, out, resume=True, **QUICK)
    assert llmprune.inspect(out).verified


def touch(source: Path, patch: pytest.MonkeyPatch) -> None:
    os.utime(source / "config.json", ns=(0, 0))


def other_threads(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch, "get_num_threads", lambda: 99)


def other_version(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("llmprune.storing.versions", lambda: {"torch": "9.9"})


def other_precision(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))


def other_processor(source: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE")


CHANGES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "recipe": ({"pattern": "60%"}, None, r"recipe\.pattern \(50%, now 60%\)"),
    "seed": ({"seed": 1}, None, r"recipe\.seed \(0, now 1\)"),
    "fewer data": ({"calibration": IDS.tolist(), "samples": 2}, None, r"recipe\.samples \(None, now 2\)"),
    "data": ({"calibration": tiny.ids(4, 16, seed=9)}, None, r"calibration\.fingerprint"),
    "source": ({}, touch, r"source\.files\.config\.json\.mtime_ns"),
    "threads": ({}, other_threads, r"hardware\.threads \(\d+, now 99\)"),
    "autocast": ({"autocast": True}, None, r"recipe\.autocast \(False, now True\)"),
    "dtype": ({"dtype": "bfloat16"}, None, r"recipe\.dtype \(auto, now bfloat16\)"),
    "precision": ({}, other_precision, r"arithmetic\.float32_products\.cuda \(ieee, now tf32\)"),
    "processor": ({}, other_processor, r"arithmetic\.instructions \(\w+, now NONE\)"),
    "version": ({}, other_version, r"versions\.torch \(\S+, now 9\.9\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_continued_by_another_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    options = {"method": "wanda", "calibration": IDS}
    left = faults.content(interrupted(source, out, 1, **options))
    other, prepare, says = CHANGES[name]
    if prepare:
        prepare(source, monkeypatch)
    with pytest.raises(CheckpointError, match=rf"begun with another {says}.*--overwrite") as caught:
        llmprune.prune(source, out, resume=True, **options | other)
    assert "\n" not in str(caught.value)
    assert faults.content(faults.partial_of(out)) == left


def test_what_a_resumed_run_reads_again_must_be_what_was_read_before(tmp_path: Path) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    llmprune.prune(source, tmp_path / "whole", calibration=IDS)
    partial_folder = interrupted(source, out, 2, calibration=IDS)
    pruned, dense = min((partial_folder / "model").glob("*.safetensors")), max(source.glob("*.safetensors"))
    for changed in (pruned, dense):
        kept = shutil.copy2(changed, tmp_path / "kept")
        faults.change(changed, "edited")
        with pytest.raises(CheckpointError, match=rf"{changed} was changed while it was in use: restore it"):
            llmprune.prune(source, out, resume=True, calibration=IDS)
        shutil.copy2(kept, changed)
    llmprune.prune(source, out, resume=True, calibration=IDS)
    assert faults.content(out) == faults.content(tmp_path / "whole")


def test_a_run_that_is_at_work_is_not_resumed_and_stops_others_at_once(tmp_path: Path) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    partial_folder = interrupted(source, out, 1, **QUICK)
    with closing(Journal(partial_folder / "journal.jsonl")):
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(CheckpointError, match=r"another run \(process \d+ on .*\) is writing"):
                llmprune.prune(source, out, **QUICK | options)
    llmprune.prune(source, out, resume=True, **QUICK)


def test_a_journal_that_is_damaged_is_refused(tmp_path: Path) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    journal = interrupted(source, out, 2, **QUICK) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"?" + lines[1] + lines[2])
    with pytest.raises(CheckpointError, match=r"journal\.jsonl is damaged in line 2: delete its folder to start anew"):
        llmprune.prune(source, out, resume=True, **QUICK)


def test_a_last_line_that_is_torn_is_forgotten(tmp_path: Path) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    llmprune.prune(source, tmp_path / "whole", **QUICK)
    journal = interrupted(source, out, 2, **QUICK) / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - 7)
    llmprune.prune(source, out, resume=True, **QUICK)
    assert faults.content(out) == faults.content(tmp_path / "whole")


def test_a_model_that_was_taken_out_of_the_partial_folder_is_missed(tmp_path: Path) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    shutil.rmtree(interrupted(source, out, 2, **QUICK) / "model")
    with pytest.raises(CheckpointError, match="has lost its model: start anew with --overwrite"):
        llmprune.prune(source, out, resume=True, **QUICK)


def test_a_bug_keeps_its_traceback_and_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = tiny.save(tiny.model("llama"), tmp_path / "source"), tmp_path / "out"
    plain = Streamed.free

    def free(host: Streamed, stage: Stage) -> None:
        plain(host, stage)
        if stage.name == "model.layers.1":
            raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Streamed, "free", free)
    with pytest.raises(ZeroDivisionError):
        llmprune.prune(source, out, **QUICK)
    assert "2 blocks kept" in caplog.text and "--resume" in caplog.text
    monkeypatch.undo()
    llmprune.prune(source, out, resume=True, **QUICK)
    assert llmprune.inspect(out).verified
