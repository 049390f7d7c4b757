"""Nothing is lost: a run is killed, stopped, starved of disk and fed broken files, and then continued."""

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import faults
import tiny

IDS = tiny.ids(4, 16)
QUICK: dict[str, Any] = {"method": "magnitude"}

# What is killed: a model, and how it is pruned. A family of `tiny.FAMILIES`, or a model that llmprune knows by name.
KILLED: dict[str, dict[str, Any]] = {
    "demo": {"calibration": IDS},
    "qwen3-moe": {"calibration": IDS, "pattern": "2:4"},
}
KILLS = 20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The processes that runs are forked from must not have threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


def source_of(name: str, place: Path) -> str | Path:
    return name if name not in tiny.FAMILIES else tiny.save(tiny.model(name), place / "source")


def content(folder: Path) -> dict[str, Any]:
    """Return all files of a model folder; of the report what is not measured."""
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "llmprune.json" in found:
        report = json.loads(found["llmprune.json"])
        found["llmprune.json"] = {k: v for k, v in report.items() if k not in ("timings", "peak_memory_bytes")}
    return found


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def require_whole_or_none(out: Path, whole: dict[str, Any]) -> None:
    """Whatever looks like a model is the complete one, and nothing else loads."""
    for folder in (out, partial_of(out), partial_of(out) / "model"):
        if (folder / "config.json").exists():
            assert content(folder) == whole
        else:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def uninterrupted(source: str | Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what a run leaves that nothing disturbs, and its events."""
    log = out.with_name("events")
    assert faults.prune(source, out, log=log, **options) == 0
    return content(out), json.loads(log.read_text())


def points(events: list[str]) -> set[int]:
    """Return random events, and for certain: data written but not journalled, a torn journal line, the rename."""
    sure = {
        events.index("before write", events.index("after pwrite")),
        events.index("in write", events.index("after pwrite")),
        events.index("before rename"),
        events.index("after rename"),
    }
    others = [point for point in range(len(events)) if point not in sure]
    return sure | set(random.Random(0).sample(others, KILLS - len(sure)))


@pytest.mark.parametrize("name", KILLED)
def test_a_run_that_is_killed_anywhere_is_continued_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    source, options = source_of(name, tmp_path), KILLED[name]
    whole, events = uninterrupted(source, tmp_path / "whole", **options)
    for point in sorted(points(events)):
        out = tmp_path / f"out-{point}"
        assert faults.prune(source, out, point=point, **options) == -9, events[point]
        require_whole_or_none(out, whole)
        require_continued(source, out, whole, **options)


def require_continued(source: str | Path, out: Path, whole: dict[str, Any], **options: Any) -> None:
    """A killed run that left no journal was complete; any other is continued, to the same bytes."""
    if not out.exists() or (partial_of(out) / "journal.jsonl").exists():
        assert faults.prune(source, out, resume=True, **options) == 0
        assert not partial_of(out).exists()
    assert content(out) == whole


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_while_an_old_output_is_replaced_leaves_the_old_or_the_new(exchange: bool, tmp_path: Path) -> None:
    source = source_of("llama", tmp_path)
    old, options = tiny.save(tiny.model("opt"), tmp_path / "old"), QUICK | {"overwrite": True}
    before = content(old)
    shutil.copytree(old, tmp_path / "whole")
    whole, events = uninterrupted(source, tmp_path / "whole", exchange=exchange, **options)
    start = len(events) - events[::-1].index("after write")  # the last entry of the journal announces the new output
    for point in range(start, len(events)):
        out = tmp_path / f"out-{point}"
        shutil.copytree(old, out)
        assert faults.prune(source, out, point=point, exchange=exchange, **options) == -9, events[point]
        assert (content(out) if out.exists() else None) in ([before, whole] if exchange else [before, whole, None])
        require_continued(source, out, whole, **options)


def test_a_run_that_is_killed_in_every_block_gets_there(tmp_path: Path) -> None:
    source, out, options = source_of("llama", tmp_path), tmp_path / "out", {"calibration": IDS}
    whole, events = uninterrupted(source, tmp_path / "whole", **options)
    _, first, second, *_ = (point for point, event in enumerate(events) if event == "after write")
    assert faults.prune(source, out, point=first + 1, **options) == -9
    ends = [faults.prune(source, out, resume=True, point=second - first + 3, **options) for _ in range(tiny.BLOCKS)]
    assert ends == [-9] * (tiny.BLOCKS - 1) + [0]
    assert content(out) == whole


@pytest.mark.parametrize(("strike", "status"), [(faults.interrupt, 130), (faults.terminate, 143)])
@pytest.mark.parametrize("moment", ["in copy", "in block 2", "in commit"])
def test_a_signal_ends_a_run_with_one_line_that_says_how_to_go_on(
    strike: faults.Strike, status: int, moment: str, tmp_path: Path
) -> None:
    source, out, said = source_of("llama", tmp_path), tmp_path / "out", tmp_path / "said"
    whole, events = uninterrupted(source, tmp_path / "whole", **QUICK)
    written = events.index("after write", events.index("after pwrite"))
    point = {
        "in copy": 9,
        "in block 2": events.index("after pwrite", written),
        "in commit": events.index("before rename"),
    }
    ended = faults.command("prune", source, out, "--method", "magnitude", said=said, point=point[moment], strike=strike)
    line = said.read_text().strip()
    assert (ended, line.count("\n")) == (status, 0)
    if moment == "in copy":
        assert line == "llmprune: interrupted, nothing was written"
        assert not out.exists() and not partial_of(out).exists()
    else:
        assert line.startswith("llmprune: interrupted, ") and "blocks are kept" in line and "--resume" in line
        require_whole_or_none(out, whole)
        require_continued(source, out, whole, **QUICK)
