"""A checkpoint folder, opened without loading anything: which tensor lies in which file."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint.guard import read_json, require_inside, require_modest
from llmprune.checkpoint.header import TensorEntry, checksum, header_of, read, read_header
from llmprune.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What belongs to a model beside its weights. Weights in other formats would still be dense, so they are left behind.
COMPANIONS = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md", "*.py", "*.yaml", "*.yml", "LICENSE*", "NOTICE*",
    "USE_POLICY*", ".gitattributes",
)  # fmt: skip
DOWNLOADED = (*COMPANIONS, "*.safetensors")
_CHECK_ELEMENTS = 1 << 20  # a tensor is looked at in chunks of this many elements

Identity = tuple[int, int]  # size in bytes, time of the last change in ns


@dataclass(frozen=True)
class Source:
    """Index of a checkpoint: tensors by name, its configuration, and the files that go with it.

    Attributes:
        checksums: of the bytes that have been read so far, by their place; what is read again must have the same.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    config: dict[str, Any]
    shards: tuple[Path, ...]
    identities: dict[Path, Identity] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> "Source":
        """Read the index and every header of a checkpoint folder.

        Raises:
            CheckpointError: no such folder, no config, no safetensors weights, an index that points to a missing
                file or contradicts the files, a link out of the folder, or a damaged or outsized file.
        """
        folder = Path(folder)
        config, places = read_fields(folder), _places(folder)
        shards = tuple(_shard(folder, name) for name in sorted(set(places.values()) or {SINGLE}))
        identities = {path: _identity(path) for path in (folder / CONFIG, *shards)}
        entries = _entries(shards)
        _require_placed(folder, places, entries)
        source = cls(folder, entries, config, shards, identities)
        for path in source.companions():
            require_modest(require_inside(folder, path))
        source.expect({source.place_of(header): checksum(header) for header in source.headers.values()})
        return source

    def companions(self) -> list[Path]:
        """Return the files other than weights that a copy of the model needs: tokenizer, configs, licence, card."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(found)

    def output_bytes(self) -> int:
        """Return the disk space that a copy of the model takes."""
        return sum(path.stat().st_size for path in [*self.shards, *self.companions()])

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this checkpoint from another: its files' sizes and times, and a hash of all headers."""
        headers = [(e.name, e.file.name, e.dtype, e.shape, e.start) for e in self.entries.values()]
        text = json.dumps([self.config, sorted(headers)], sort_keys=True)
        files = {path.relative_to(self.folder).as_posix(): identity for path, identity in self.identities.items()}
        named = {name: {"size": size, "mtime_ns": mtime} for name, (size, mtime) in files.items()}
        return {"files": named, "headers": hashlib.sha256(text.encode()).hexdigest()}

    def require_unchanged(self, paths: Iterable[Path] | None = None) -> None:
        """Check that files are as they were when the checkpoint was opened; all of them if none are named.

        Raises:
            CheckpointError: one was changed or is gone.
        """
        for path in self.identities if paths is None else paths:
            if path in self.identities and _identity(path) != self.identities[path]:
                raise _changed(path)
        if paths is None and self.identities and read_fields(self.folder) != self.config:
            raise _changed(self.folder / CONFIG)

    def expect(self, checksums: dict[str, int]) -> None:
        """Let all that is read from now on, and what was read before, be what has these checksums.

        Raises:
            CheckpointError: something was read before that has another.
        """
        for place, known in checksums.items():
            if self.checksums.setdefault(place, known) != known:
                raise _changed(self.folder / place.rpartition("@")[0])

    def verify(self, names: Iterable[str]) -> dict[str, int]:
        """Read the named tensors, and what precedes them in their files; return the checksums by place.

        Raises:
            CheckpointError: a file cannot be read, or other bytes were read there before.
        """
        entries = [self.entries[name] for name in names]
        headers = [self.headers[path] for path in {entry.file: None for entry in entries}]
        found = {self.place_of(entry): checksum(entry) for entry in [*entries, *headers]}  # a failure names a tensor
        self.expect(found)
        return found

    def place_of(self, entry: TensorEntry) -> str:
        """Return what tells the bytes of a tensor from all others, the same in every copy of the checkpoint."""
        return f"{entry.file.relative_to(self.folder).as_posix()}@{entry.start}+{entry.size}"

    @cached_property
    def by_file(self) -> dict[Path, list[TensorEntry]]:
        """The tensors of each file that holds any."""
        found: dict[Path, list[TensorEntry]] = defaultdict(list)
        for entry in self.entries.values():
            found[entry.file].append(entry)
        return found

    @cached_property
    def headers(self) -> dict[Path, TensorEntry]:
        """What precedes the tensors of each of these files."""
        return {path: header_of(entries) for path, entries in self.by_file.items()}

    @contextmanager
    def slices(self, names: Iterable[str], copied: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Open the named tensors as safetensors slices: nothing is held in memory until a slice is indexed.

        Args:
            names: of the tensors.
            copied: those of them to read at once instead, into memory of their own: what is to be overwritten, as the
                system copies mapped memory page by page when it is written to, which takes ten times longer.

        Raises:
            CheckpointError: a file cannot be read, or was changed, be it with the same size and time.
        """
        entries = {name: self.entries[name] for name in names}
        mapped = [entry for name, entry in entries.items() if name not in copied]
        paths = {entry.file: None for entry in entries.values()}
        self.require_unchanged(paths)
        self.verify(entry.name for entry in mapped)
        with ExitStack() as stack:
            files = {path: stack.enter_context(_open(path)) for path in {entry.file: None for entry in mapped}}
            yield {
                name: self._copy(entry) if name in copied else files[entry.file].get_slice(name)
                for name, entry in entries.items()
            }
        self.require_unchanged(paths)

    def _copy(self, entry: TensorEntry) -> Tensor:
        """Return a tensor in memory of its own, whose bytes are what they were when they were read before."""
        tensor, seen = read(entry)
        self.expect({self.place_of(entry): seen})
        return tensor

    def chunks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Yield the tensor called `name` in pieces of a multiple of `multiple` rows (a scalar as it is)."""
        entry = self.entries[name]
        with self.slices([name]) as opened:
            if not entry.shape or entry.count <= _CHECK_ELEMENTS:
                yield opened[name][...]
                return
            step = step_of(entry, multiple)
            for start in range(0, entry.shape[0], step):
                yield opened[name][start : start + step]


def step_of(entry: TensorEntry, multiple: int) -> int:
    """Return how many rows, a multiple of `multiple`, a tensor of one dimension or more is read in at a time."""
    return max(1, _CHECK_ELEMENTS * entry.shape[0] // (max(entry.count, 1) * multiple)) * multiple


def read_fields(folder: Path) -> dict[str, Any]:
    """Return what is in a model folder's config.json.

    Raises:
        CheckpointError: there is no such folder, or no config.json in it that can be read.
    """
    if not (_existing_folder(folder) / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}")
    return read_json(folder, CONFIG)


def has_weights(folder: Path) -> bool:
    """Say whether a model folder holds safetensors, or an index that says it should."""
    return (folder / INDEX).exists() or any(folder.glob("*.safetensors"))


def _existing_folder(folder: Path) -> Path:
    if not folder.is_dir():
        cause = "is a file, not a model folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {cause}; give a folder, a Hub id such as 'org/name', or 'demo'")
    return folder


def _places(folder: Path) -> dict[str, str]:
    """Return which file each tensor is in as the index says; empty where there is no index."""
    if (folder / SINGLE).is_file():  # transformers too prefers the single file when both are there
        return {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    mapping = read_json(folder, INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{folder / INDEX} has no 'weight_map' from tensors to files")
    return mapping


def _shard(folder: Path, name: str) -> Path:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder / INDEX} names '{name}', which lies outside the model's folder")
    if not _is_file(folder / relative):
        raise CheckpointError(f"{folder / INDEX} names '{name}', which is missing: download the model again")
    if relative.suffix != ".safetensors":
        raise CheckpointError(
            f"{folder / INDEX} names '{name}', which is no .safetensors file: llmprune loads no other"
        )
    return require_inside(folder, folder / relative)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _entries(shards: Iterable[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for entry in (entry for shard in shards for entry in read_header(shard)):
        if entry.name in entries:
            raise CheckpointError(f"{entry.name} is both in {entries[entry.name].file} and in {entry.file}: remove one")
        entries[entry.name] = entry
    if not entries:
        raise CheckpointError(f"{', '.join(map(str, shards))} holds no tensors: download the model again")
    return entries


def _require_placed(folder: Path, places: dict[str, str], entries: dict[str, TensorEntry]) -> None:
    for name, file in places.items():
        if name not in entries or entries[name].file != folder / file:
            raise CheckpointError(
                f"{folder / INDEX} places {name} in '{file}', which lacks it: download the model again"
            )


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if not pickles:
        return f"{folder} has no safetensors weights ({SINGLE} or {INDEX})"
    return (
        f"{folder} has only pickled weights ({pickles[0]}), which llmprune does not load; convert them with: python -c "
        f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('NEW')\""
    )


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} was changed while it was in use: restore it")


def _identity(path: Path) -> Identity:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from None
