"""Nothing is lost: a run is killed, stopped, starved of disk and fed broken files, and then continued."""

import json
import random
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import faults
import tiny
from llmprune.checkpoint import Source

IDS = tiny.ids(4, 16)
QUICK: dict[str, Any] = {"method": "magnitude"}

# What is killed: a model, and how it is pruned. A family of `tiny.FAMILIES`, or a model that llmprune knows by name.
KILLED: dict[str, dict[str, Any]] = {
    "demo": {"calibration": IDS},
    "qwen3-moe": {"calibration": IDS, "pattern": "2:4"},
}
KILLS = 20


def source_of(name: str, place: Path) -> str | Path:
    return name if name not in tiny.FAMILIES else tiny.save(tiny.model(name), place / "source")


def require_whole_or_none(out: Path, whole: dict[str, Any]) -> None:
    """Whatever looks like a model is the complete one, and nothing else loads."""
    for folder in (out, faults.partial_of(out), faults.partial_of(out) / "model"):
        if (folder / "config.json").exists():
            assert faults.content(folder) == whole
        else:
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)


def uninterrupted(source: str | Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what a run leaves that nothing disturbs, and its events."""
    log = out.with_name("events")
    assert faults.prune(source, out, log=log, **options) == 0
    return faults.content(out), json.loads(log.read_text())


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
    if not out.exists() or (faults.partial_of(out) / "journal.jsonl").exists():
        assert faults.prune(source, out, resume=True, **options) == 0
        assert not faults.partial_of(out).exists()
    assert faults.content(out) == whole


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_while_an_old_output_is_replaced_leaves_the_old_or_the_new(exchange: bool, tmp_path: Path) -> None:
    source = source_of("llama", tmp_path)
    old, options = tiny.save(tiny.model("opt"), tmp_path / "old"), QUICK | {"overwrite": True}
    before = faults.content(old)
    shutil.copytree(old, tmp_path / "whole")
    whole, events = uninterrupted(source, tmp_path / "whole", exchange=exchange, **options)
    start = len(events) - events[::-1].index("after write")  # the last entry of the journal announces the new output
    for point in range(start, len(events)):
        out = tmp_path / f"out-{point}"
        shutil.copytree(old, out)
        assert faults.prune(source, out, point=point, exchange=exchange, **options) == -9, events[point]
        assert (faults.content(out) if out.exists() else None) in (
            [before, whole] if exchange else [before, whole, None]
        )
        require_continued(source, out, whole, **options)


def test_a_run_that_is_killed_in_every_block_gets_there(tmp_path: Path) -> None:
    source, out, options = source_of("llama", tmp_path), tmp_path / "out", KILLED["demo"]
    whole, events = uninterrupted(source, tmp_path / "whole", **options)
    begun, copied, first, second, *_ = (point for point, event in enumerate(events) if event == "after write")
    assert begun < copied < events.index("before pwrite") < first
    assert faults.prune(source, out, point=first + 1, **options) == -9
    ends = [faults.prune(source, out, resume=True, point=second - first + 3, **options) for _ in range(tiny.BLOCKS)]
    assert ends == [-9] * (tiny.BLOCKS - 1) + [0]
    assert faults.content(out) == whole


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
        assert not out.exists() and not faults.partial_of(out).exists()
    else:
        assert line.startswith("llmprune: interrupted, ") and "kept in" in line and "--resume" in line
        require_whole_or_none(out, whole)
        require_continued(source, out, whole, **QUICK)


@dataclass(frozen=True)
class Undisturbed:
    """A model, what an undisturbed run makes of it, that run's events, and the first write of its second block."""

    source: Path
    whole: dict[str, Any]
    events: list[str]
    start: int


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    place = tmp_path_factory.mktemp("whole")
    source = tiny.save(tiny.model("llama"), place / "source")
    whole, events = uninterrupted(source, place / "out", **QUICK)
    start = events.index("before pwrite", events.index("after write", events.index("after pwrite")))
    return Undisturbed(source, whole, events, start)


# Where a run is struck, how, and what it says then.
FULL_DISK: dict[str, tuple[str, str]] = {
    "tensor": ("before pwrite", r"cannot write model\.layers\.1\.\S+\.weight to \S+out\.partial/model/model-0000"),
    "half a tensor": ("in pwrite", r"cannot write model\.layers\.1\.\S+\.weight to \S+\.safetensors"),
    "sync": ("before fsync", r"cannot write model\.layers\.1 to \S+\.safetensors"),
    "journal": ("before write", r"cannot write model\.layers\.1 to \S+journal\.jsonl"),
    "half a line": ("in write", r"cannot write model\.layers\.1 to \S+journal\.jsonl"),
}


def struck(source: Path, out: Path, point: int, strike: faults.Strike) -> str:
    """Return the one line that a run ends with."""
    said = out.with_name("said")
    status = faults.command("prune", source, out, "--method", "magnitude", said=said, point=point, strike=strike)
    assert status == 2, said.read_text()
    (line,) = said.read_text().splitlines()
    return line


@pytest.mark.parametrize("name", FULL_DISK)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(
    name: str, run: Undisturbed, tmp_path: Path
) -> None:
    (event, says), out = FULL_DISK[name], tmp_path / "out"
    line = struck(run.source, out, run.events.index(event, run.start), faults.fill_disk)
    assert re.search(says + r"\S*: No space left on device; 1 block kept in \S+out\.partial: .*--resume", line), line
    require_whole_or_none(out, run.whole)
    require_continued(run.source, out, run.whole, **QUICK)


@pytest.mark.parametrize("event", ["before copyfile", "after copyfile", "before mkdir"])
def test_a_disk_that_is_full_before_a_block_is_done_leaves_nothing(
    event: str, run: Undisturbed, tmp_path: Path
) -> None:
    line = struck(run.source, tmp_path / "out", run.events.index(event), faults.fill_disk)
    assert "No space left on device" in line
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_a_limit_on_the_size_of_files_is_one_line_that_names_both_files(run: Undisturbed, tmp_path: Path) -> None:
    line = struck(run.source, tmp_path / "out", 0, partial(faults.limit_files, 50_000))
    assert re.search(r"cannot copy \S+/source/(\S+\.safetensors) to \S+out\.partial/model/\1: File too large", line), (
        line
    )
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


def test_weights_that_do_not_fit_aside_are_one_line(tmp_path: Path) -> None:
    """What a run with a wider dtype than the stored one goes on with is written by another library."""
    source, out, said = (
        tiny.save(tiny.model("llama", torch.bfloat16), tmp_path / "source"),
        tmp_path / "out",
        tmp_path / "said",
    )
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    asked = ("prune", source, out, "--method", "magnitude", "--dtype", "float32")
    assert faults.command(*asked, said=said, point=0, strike=partial(faults.limit_files, largest)) == 2
    (line,) = said.read_text().splitlines()
    assert re.search(
        r"cannot write model\.layers\.0 to \S+out\.partial/aside/model\.layers\.0\.safetensors: .*large", line
    )
    assert {path.name for path in tmp_path.iterdir()} == {"source", "said"}


def test_a_disk_that_cannot_be_read_is_one_line_and_the_run_goes_on_when_it_can(
    run: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    line = struck(run.source, out, run.start, faults.break_reads)
    assert re.search(
        r"cannot read model\.layers\.2\.\S+ from \S+\.safetensors: Input/output error; 2 blocks kept", line
    ), line
    require_whole_or_none(out, run.whole)
    require_continued(run.source, out, run.whole, **QUICK)


@pytest.mark.parametrize("change", ["truncated", "touched", "rewritten", "removed"])
@pytest.mark.parametrize("moment", ["before pwrite", "after copyfile", "before mkdir"])
def test_a_source_that_changes_is_one_line_and_the_run_goes_on_when_it_is_restored(
    change: str, moment: str, run: Undisturbed, tmp_path: Path
) -> None:
    source, out, kept = Path(shutil.copytree(run.source, tmp_path / "source")), tmp_path / "out", tmp_path / "kept"
    shard = max(source.glob("*.safetensors"))
    shutil.copy2(shard, kept)
    point = run.start if moment == "before pwrite" else run.events.index(moment)
    line = struck(source, out, point, partial(faults.change, shard, change))
    assert re.search(rf"{shard.name} was changed|cannot (read|copy) \S*{shard.name}", line), line
    require_whole_or_none(out, run.whole)
    shutil.copy2(kept, shard)
    require_continued(source, out, run.whole, **QUICK)


@pytest.mark.parametrize(
    ("moment", "tensor"),
    [("after copyfile", "model.embed_tokens.weight"), ("before pwrite", "model.layers.2.mlp.down_proj.weight")],
)
def test_a_source_that_changes_and_keeps_its_size_and_time_is_one_line(
    moment: str, tensor: str, run: Undisturbed, tmp_path: Path
) -> None:
    """The embedding is read before all is copied, the last block afterwards."""
    source, out, kept = Path(shutil.copytree(run.source, tmp_path / "source")), tmp_path / "out", tmp_path / "kept"
    changed = Source.open(source).entries[tensor].file
    shutil.copy2(changed, kept)
    point = run.events.index(moment, run.start if moment == "before pwrite" else 0)
    line = struck(source, out, point, partial(faults.change, changed, "edited"))
    assert re.search(rf"{changed.name} was changed while it was in use: restore it", line), line
    require_whole_or_none(out, run.whole)
    shutil.copy2(kept, changed)
    require_continued(source, out, run.whole, **QUICK)


def test_every_test_that_the_documentation_names_exists() -> None:
    here = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (here.parent / "docs" / "RELIABILITY.md").read_text("utf-8")))
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text("utf-8") for p in here.glob("*.py")), re.M))
    assert len(named) > 40
    assert named - defined == set()
