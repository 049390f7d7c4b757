"""Where a run writes: the output, and beside it the folder in which the work lies until it is complete."""

import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.source import CONFIG, Source
from llmprune.errors import CheckpointError

ALLOCATION = "allocation"  # what the journal calls the record of it, among those of stages
_JOURNAL = "journal.jsonl"  # also tells our own unfinished folder from somebody's folder of the same name


@dataclass(frozen=True)
class Place:
    """`OUT`, and `OUT.partial` with the journal and, in `model`, what is to become `OUT`."""

    out: Path

    @classmethod
    def of(cls, out: Path) -> "Place":
        """Return the place of an output; `.` has no name of its own."""
        return cls(out.resolve())

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def model(self) -> Path:
        return self.partial / "model"

    @property
    def replaced(self) -> Path:
        """Where an old output waits to be deleted."""
        return self.partial / "replaced"

    def claim(self) -> Journal:
        """Make OUT.partial if it is not there, and lock it.

        Raises:
            CheckpointError: another run holds it, it is not ours, or it cannot be made.
        """
        if self.partial.exists() and not self._is_ours():
            raise CheckpointError(f"{self.partial} is in the way and was not made by llmprune: move it")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {self.partial}: {error.strerror}") from None
        return Journal(self.partial / _JOURNAL)

    def clear(self) -> None:
        """Delete all that is in OUT.partial but the journal; an output that a crash left there goes back first."""
        if self.replaced.exists() and not self.out.exists():
            os.rename(self.replaced, self.out)
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def remove(self) -> None:
        """Delete OUT.partial, the journal last: while it is there, the folder is known as ours."""
        self.clear()
        (self.partial / _JOURNAL).unlink()
        self.partial.rmdir()

    def _is_ours(self) -> bool:
        return self.partial.is_dir() and ((self.partial / _JOURNAL).is_file() or not any(self.partial.iterdir()))


@dataclass(frozen=True)
class Unfinished:
    """What an earlier run has left in OUT.partial: what is done, in words, whether OUT is complete, and bytes."""

    done: str = ""
    committed: bool = False
    size: int = 0


def find_unfinished(place: Place) -> Unfinished:
    """Return what an earlier run has left.

    Raises:
        CheckpointError: another run is at work there, or the folder is not ours.
    """
    if not place.partial.exists():
        return Unfinished()
    with closing(place.claim()) as journal:
        size = sum(path.stat().st_size for path in place.partial.rglob("*") if path.is_file())
        return Unfinished(described(pruned(journal)), is_committed(place, journal), size)


def described(done: Collection[str]) -> str:
    """Return in words what is done, by the names of its records: `3 blocks`."""
    blocks = len([name for name in done if name != ALLOCATION])
    count = [f"{blocks} block{'s' if blocks > 1 else ''}"] if blocks else []
    return " and ".join(["the allocation of sparsity"] * (ALLOCATION in done) + count)


def pruned(journal: Journal) -> dict[str, Any]:
    """Return the records of the stages whose tensors are on the disk for good, by the stages' names."""
    return {record["stage"]: record for record in journal.records if "stage" in record}


def is_committed(place: Place, journal: Journal) -> bool:
    """Say whether the folder that was to become OUT is OUT by now."""
    return place.out.exists() and folder_id(place.out) == announced(journal)


def announced(journal: Journal) -> list[int] | None:
    """Return the id of the folder that is about to become OUT, or has become it."""
    ids = [record["commit"] for record in journal.records if "commit" in record]
    return ids[-1] if ids else None


def folder_id(folder: Path) -> list[int]:
    """Return what a folder keeps when it is renamed."""
    status = folder.stat()
    return [status.st_dev, status.st_ino]


def require_place(source: Source, out: Path, overwrite: bool) -> None:
    """As `require_places`, for one output.

    Raises:
        CheckpointError: as `require_places`.
    """
    require_places(source, [out], overwrite)


def require_places(
    source: Source, outs: Sequence[Path], overwrite: bool, resume: bool = False, compressed: bool = False
) -> None:
    """Check, before any work, that outputs can be written; `compressed` needs room for one file of weights more.

    Raises:
        CheckpointError: an output exists, lies inside the source (or the source inside it), would replace something
            that is not a model, cannot be created, is being written by another run, or an unfinished run is there that
            is neither to be resumed nor to be overwritten; or they do not all fit on the disk.
    """
    way_out = "pass --overwrite to replace it" + ", or --resume to keep what is complete" * (len(outs) > 1)
    held = sum(_require_free(source, out, overwrite, resume, way_out) for out in outs)
    twice = max(shard.stat().st_size for shard in source.shards) if compressed else 0
    if outs:
        _require_space(Place.of(outs[0]), len(outs) * source.output_bytes() + twice, held)  # they lie side by side


def _require_free(source: Source, out: Path, overwrite: bool, resume: bool, way_out: str) -> int:
    """Return the bytes that an unfinished run has left there."""
    inside, place = source.folder.resolve(), Place.of(out)
    if place.out == inside or inside in place.out.parents or place.out in inside.parents:
        raise CheckpointError(f"output {out} and source {source.folder} must not lie inside each other")
    found = find_unfinished(place)
    if out.exists() and not overwrite and not (resume and found.committed):
        raise CheckpointError(f"output {out} exists: choose another folder, or {way_out}")
    if out.exists() and not _is_model(out) and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"output {out} is not a model folder, and only such are replaced: choose another place")
    if found.done and not resume and not overwrite:
        raise CheckpointError(
            f"{place.partial} holds an unfinished run ({found.done} done): "
            "continue it with --resume, or start anew with --overwrite"
        )
    return found.size


def _require_space(place: Place, size: int, held: int) -> None:
    parent = next(folder for folder in place.out.parents if folder.exists())
    if not parent.is_dir():
        raise CheckpointError(f"output {place.out} cannot be created: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"output {place.out} cannot be created: no permission to write in {parent}")
    needed, free = size / 1e9, (shutil.disk_usage(parent).free + held) / 1e9
    if needed > free:
        raise CheckpointError(f"too little disk for {place.out}: needs {needed:.2f} GB, {free:.2f} GB are free")


def _is_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))
