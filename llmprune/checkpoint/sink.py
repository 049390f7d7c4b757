"""An output folder that appears all at once: a copy of the source in which pruned tensors are overwritten.

The copy keeps shard names, key order, dtypes and metadata, and every tensor that is not written stays byte-identical.
Until `commit` the work lies in `OUT.partial`; if anything fails before that, nothing is left behind.
"""

import fcntl
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from llmprune.checkpoint.source import Source
from llmprune.errors import CheckpointError
from llmprune.progress import Progress

REPORT = "llmprune.json"
_MARKER = "llmprune.partial"  # tells our own unfinished folder from somebody's folder of the same name


class Sink:
    """Context manager: `copy_source`, `write` tensors, then `commit`; leaving without a commit removes the work."""

    def __init__(self, source: Source, out: Path) -> None:
        self.out = out.resolve()  # `.` has no name of its own
        self._source = source
        self._partial = self.out.with_name(self.out.name + ".partial")
        self._entries = {name: replace(entry, file=self._target(entry.file)) for name, entry in source.entries.items()}

    def __enter__(self) -> "Sink":
        _discard_leftover(self._partial)
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"cannot create {self._partial}: {error.strerror}") from None
        self._lock = _lock(self._partial / _MARKER)
        return self

    def copy_source(self) -> None:
        """Copy the source's weights and the files that go with them.

        Raises:
            CheckpointError: a file cannot be read or written.
        """
        paths = [*self._source.companions(), *self._source.shards]
        with Progress(len(paths), "copying", "file") as bar:
            for path in paths:
                self._copy(path)
                bar.step()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite the tensor called `name`; its shape must be the stored one, its values are cast to that dtype."""
        entry = self._entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise AssertionError(f"{name}: shape {tuple(tensor.shape)} written over {entry.shape}")
        data = tensor.detach().to("cpu", entry.torch_dtype).contiguous().view(-1).view(torch.uint8).numpy()
        try:
            with entry.file.open("r+b") as file:
                file.seek(entry.start)
                file.write(data.data)
        except OSError as error:
            raise CheckpointError(f"cannot write {name} to {entry.file}: {error.strerror}") from None

    def commit(self, report: dict[str, Any]) -> None:
        """Add the report and let the output appear under its own name."""
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (self._partial / REPORT).write_text(text + "\n", "utf-8")
        (self._partial / _MARKER).unlink()
        if not self.out.exists():
            self._partial.rename(self.out)
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{self.out.name}.replaced-", dir=self.out.parent))
        self.out.rename(aside / self.out.name)
        self._partial.rename(self.out)
        shutil.rmtree(aside, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _copy(self, path: Path) -> None:
        target = self._target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except OSError as error:
            raise CheckpointError(f"cannot copy {path} to {target}: {error.strerror}") from None

    def _target(self, path: Path) -> Path:
        return self._partial / path.relative_to(self._source.folder)


def require_place(source: Source, out: Path, overwrite: bool) -> None:
    """Check, before any work, that the output can be written.

    Raises:
        CheckpointError: the output exists, lies inside the source (or the source inside it), would replace something
            that is not a model, cannot be created, or does not fit on the disk.
    """
    inside, resolved = source.folder.resolve(), out.resolve()
    if resolved == inside or inside in resolved.parents or resolved in inside.parents:
        raise CheckpointError(f"output {out} and source {source.folder} must not lie inside each other")
    if out.exists() and not overwrite:
        raise CheckpointError(f"output {out} exists: choose another folder, or pass --overwrite to replace it")
    if out.exists() and not _is_model(out) and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"output {out} is not a model folder: llmprune does not replace it")
    parent = next(folder for folder in resolved.parents if folder.exists())
    if not parent.is_dir():
        raise CheckpointError(f"output {out} cannot be created: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"output {out} cannot be created: no permission to write in {parent}")
    needed, free = source.output_bytes(), shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(f"too little disk for {out}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


def _discard_leftover(partial: Path) -> None:
    if not partial.exists():
        return
    if not (partial / _MARKER).exists():
        raise CheckpointError(f"{partial} is in the way and was not made by llmprune: move it")
    with _lock(partial / _MARKER):
        shutil.rmtree(partial)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _lock(marker: Path) -> IO[str]:
    """Hold the marker for as long as the returned file is open; the system lets go of it if the process dies."""
    file = marker.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(
            f"another run is writing {marker.parent}: wait for it, or choose another output"
        ) from None
    return file
