"""An output folder that appears all at once: a copy of the source in which pruned tensors are overwritten.

The copy keeps shard names, key order, dtypes and metadata, and every tensor that is not written stays byte-identical.
Until `commit` the work lies in `OUT.partial/model`, without the `config.json` that would make it a model. A journal
beside it says which stages are on the disk for good; a run that was interrupted is continued from there.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmprune.checkpoint import durable
from llmprune.checkpoint.compressed import compress_shards
from llmprune.checkpoint.format import DENSE_CONFIG, compressed_config
from llmprune.checkpoint.journal import this_process
from llmprune.checkpoint.pinned import on_host
from llmprune.checkpoint.place import Place, announced, described, folder_id, is_committed, pruned
from llmprune.checkpoint.source import CONFIG, Source
from llmprune.errors import CheckpointError, Interrupted, LlmpruneError, NumericalError, UnsupportedModelError
from llmprune.progress import Progress

REPORT = "llmprune.json"
_WRITERS = 4  # threads
_FINAL = (NumericalError, UnsupportedModelError)  # a run that goes on would end in these again

_log = logging.getLogger(__name__)


class Sink:
    """Context manager: `copy_source`, `write` and `finish` stages, then `commit`.

    Leaving without a commit removes the work, unless a stage is finished: then it is kept for a run with `resume`. It
    is removed too where the numbers or the model are at fault, which would only stop the next run at the same place.

    Args:
        source: what is copied.
        out: the output folder.
        fingerprint: plain values that decide the result; a run is only continued by one that has the same.
        resume: continue an unfinished run where there is one.
        compressed: let the output be what `llmprune compress` makes of the dense one.
    """

    def __init__(
        self,
        source: Source,
        out: Path,
        fingerprint: dict[str, Any] | None = None,
        resume: bool = False,
        compressed: bool = False,
    ) -> None:
        self.place = Place.of(out)
        self._source, self._resume, self._compressed = source, resume, compressed
        self._fingerprint = json.loads(json.dumps(fingerprint or {}))
        entries = {name: replace(entry, file=self._target(entry.file)) for name, entry in source.entries.items()}
        shards = tuple(self._target(path) for path in source.shards)
        self.copy = Source(self.place.model, entries, source.config, shards)  # what has been written so far
        self.done: dict[str, dict[str, Any]] = {}  # the records of the stages that an earlier run has finished
        self._touched: set[Path] = set()
        self._written: dict[str, int] = {}  # the checksums of what was written since a stage was finished
        self._committed = False

    def __enter__(self) -> "Sink":
        self._journal = self.place.claim()
        self._replaces = self.place.out.exists()
        try:
            self._begin()
        except BaseException:
            self._leave(keep=bool(pruned(self._journal)))
            raise
        return self

    def copy_source(self) -> None:
        """Copy the source's weights and the files that go with them, unless an earlier run has.

        Raises:
            CheckpointError: a file cannot be read or written, or was changed.
        """
        if self.done:
            return
        paths = [path for path in self._source.companions() if path.name != CONFIG] + [*self._source.shards]
        with Progress(len(paths), "copying", "file") as bar:
            for path in paths:
                with _writing(self._target(path), f"copy {path} to"):
                    durable.copy(path, self._target(path))
                self._source.require_unchanged([path])
                self._source.expect(self.copy.verify(entry.name for entry in self._source.by_file.get(path, ())))
                bar.step()
        self._source.require_unchanged()
        with _writing(self.place.partial):
            durable.sync_tree(self.place.partial)
            durable.sync(self.place.partial.parent)
        self._note({"copied": self.copy.checksums})

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite the tensor called `name`; its shape must be the stored one, its values are cast to that dtype."""
        entry = self.copy.entries[name]
        if tuple(tensor.shape) != entry.shape:
            raise AssertionError(f"{name}: shape {tuple(tensor.shape)} written over {entry.shape}")
        data = on_host(tensor.detach().to(entry.torch_dtype).contiguous()).view(-1).view(torch.uint8).numpy()
        with _writing(entry.file, f"write {name} to"):
            durable.overwrite(entry.file, entry.start, data.data)
        self._written[self.copy.place_of(entry)] = xxhash.xxh3_64(data.data).intdigest()
        self._touched.add(entry.file)

    def write_all(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """`write` each of these; what comes from a GPU side by side, as one thread is slower than the bus."""
        with ThreadPoolExecutor(_WRITERS) as writers:
            jobs = []
            for name, tensor in tensors:
                if tensor.device.type == "cpu":
                    self.write(name, tensor)
                else:
                    jobs.append(writers.submit(self.write, name, on_host(tensor.detach())))
            for job in jobs:
                job.result()

    def set_aside(self, stage: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors of a stage as they are, for the run to go on with; they are no part of the output."""
        path = self._aside(stage)
        with _writing(path, f"write {stage} to"):
            path.parent.mkdir(exist_ok=True)
            save_file(tensors, path)
        self._touched |= {path, path.parent}

    def aside(self, stage: str) -> dict[str, torch.Tensor]:
        """Return what was set aside of a stage."""
        path = self._aside(stage)
        try:
            return load_file(path) if path.exists() else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): start anew with --overwrite") from None

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Note that all tensors of a stage are written, with what is to be known of it; on return that is durable."""
        for path in sorted(self._touched):
            with _writing(path, f"write {stage} to"):
                durable.sync(path)
        self._touched.clear()
        self._note({"stage": stage, "written": self._written, **record}, f"write {stage} to")
        self.copy.checksums.update(self._written)
        self._written = {}

    def commit(self, report: dict[str, Any]) -> None:
        """Add the report and let the output appear under its own name."""
        if not is_committed(self.place, self._journal):
            if self.place.out.exists() and not self._replaces:
                raise CheckpointError(f"output {self.place.out} has appeared meanwhile: move it")
            self._complete(report)
            self._note({"commit": folder_id(self.place.model)})
            with _writing(self.place.out):
                durable.move(self.place.model, self.place.out, self.place.replaced)
        self._committed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = {} if self._committed or isinstance(error, _FINAL) else pruned(self._journal)
        self._leave(keep=bool(done))
        if error is not None and done:
            kept = f"{described(done)} kept in {self.place.partial}"
            _explain(error, f"{kept}: run the same with --resume to continue")

    def _leave(self, keep: bool) -> None:
        """Let go of the work, and remove it if nobody needs it."""
        try:
            if not keep:
                self.place.remove()
        except OSError as fault:
            _log.warning("cannot remove %s: %s", self.place.partial, fault.strerror)
        finally:
            self._journal.close()

    def _begin(self) -> None:
        """Continue the run that is there, or start one."""
        if self._resume and pruned(self._journal):
            self._require_same()
            self._expect_the_same()
            self.done = pruned(self._journal)
            return
        with _writing(self.place.partial):
            self.place.clear()
            self._journal.clear()
            self.place.model.mkdir()
        self._note({"run": self._fingerprint})

    def _require_same(self) -> None:
        found = self._journal.records[0].get("run")
        if other := difference(found, self._fingerprint):
            raise CheckpointError(
                f"{self.place.partial} was begun with another {other}: continue with what it was, "
                "or start anew with --overwrite"
            )
        there = self.place.model.is_dir() and announced(self._journal) in (None, folder_id(self.place.model))
        if not there and not is_committed(self.place, self._journal):
            raise CheckpointError(f"{self.place.partial} has lost its model: start anew with --overwrite")

    def _expect_the_same(self) -> None:
        """Let what is read again be what the earlier run has read, and what it has written."""
        for record in self._journal.records:
            copied = record.get("copied", {})
            self._source.expect(copied)
            self.copy.checksums.update(copied | record.get("written", {}))

    def _complete(self, report: dict[str, Any]) -> None:
        """Add what makes the folder a model; the report takes note of the files that go with it."""
        self._source.require_unchanged()
        names = [path.name for path in self._source.companions() if path.name != REPORT]
        text = json.dumps(report | {"companions": names}, indent=2, ensure_ascii=False, allow_nan=False)
        model, config = self.place.model, self._source.folder / CONFIG
        with _writing(model):
            durable.write_text(model / REPORT, text + "\n")
            if self._compressed:
                compress_shards(self.copy.shards)
                durable.copy(config, model / DENSE_CONFIG)
                durable.write_text(model / CONFIG, compressed_config(self._source.config))
            else:
                durable.copy(config, model / CONFIG)
            durable.sync_tree(model)

    def _note(self, record: dict[str, Any], action: str = "write") -> None:
        with _writing(self._journal.path, action):
            self._journal.append(record | {"by": this_process()})

    def _aside(self, stage: str) -> Path:
        return self.place.partial / "aside" / f"{stage}.safetensors"

    def _target(self, path: Path) -> Path:
        return self.place.model / path.relative_to(self._source.folder)


@contextmanager
def _writing(path: Path, action: str = "write") -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot {action} {path}: {cause}") from None


def _explain(error: BaseException, kept: str) -> None:
    """Add to an error what is left of the run; errors that are not ours keep their traceback and get a warning."""
    if isinstance(error, LlmpruneError):
        raise type(error)(f"{error}; {kept}") from error.__cause__
    if isinstance(error, KeyboardInterrupt):
        raise Interrupted(kept, *error.args) from None
    _log.warning("%s", kept)


def difference(old: Any, new: Any, name: str = "") -> str | None:
    """Return the first value in which two nestings of plain values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new | old:
            if found := difference(old.get(key), new.get(key), f"{name}.{key}" if name else key):
                return found
        return None
    return None if old == new else f"{name} ({old}, now {new})"
