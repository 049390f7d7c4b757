"""A checkpoint folder, opened without loading anything: which tensor lies in which file."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmprune.checkpoint.header import TensorEntry, read_header
from llmprune.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What belongs to a model beside its weights. Weights in other formats would still be dense, so they are left behind.
COMPANIONS = (
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md", "*.py", "*.yaml", "*.yml", "LICENSE*", "NOTICE*",
    "USE_POLICY*", ".gitattributes",
)  # fmt: skip
DOWNLOADED = (*COMPANIONS, "*.safetensors")
_CHECK_ELEMENTS = 1 << 20  # a tensor is looked at in chunks of this many elements


@dataclass(frozen=True)
class Source:
    """Index of a checkpoint: tensors by name, its configuration, and the files that go with it."""

    folder: Path
    entries: dict[str, TensorEntry]
    config: dict[str, Any]
    shards: tuple[Path, ...]

    @classmethod
    def open(cls, folder: str | Path) -> "Source":
        """Read the index and every header of a checkpoint folder.

        Raises:
            CheckpointError: no such folder, no config, no safetensors weights, an index that points to a missing
                file or outside the folder, or a damaged file.
        """
        folder = Path(folder)
        config = _read_json(_existing_folder(folder) / "config.json", "not a model folder: it has no config.json")
        shards = _shards(folder)
        entries = {entry.name: entry for shard in shards for entry in read_header(shard)}
        if not entries:
            raise CheckpointError(f"{folder} holds no tensors: download the model again")
        return cls(folder, entries, config, shards)

    def companions(self) -> list[Path]:
        """Return the files other than weights that a copy of the model needs: tokenizer, configs, licence, card."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(found)

    def output_bytes(self) -> int:
        """Return the disk space that a copy of the model takes."""
        return sum(path.stat().st_size for path in [*self.shards, *self.companions()])

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Open the named tensors as safetensors slices: nothing is read until a slice is indexed."""
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            opened = {}
            for name in names:
                path = self.entries[name].file
                if path not in files:
                    files[path] = stack.enter_context(_open(path))
                opened[name] = files[path].get_slice(name)
            yield opened

    def chunks(self, name: str, multiple: int = 1) -> Iterator[torch.Tensor]:
        """Yield the tensor called `name` in pieces of a multiple of `multiple` rows (a scalar as it is)."""
        entry = self.entries[name]
        with self.slices([name]) as opened:
            if not entry.shape or entry.count <= _CHECK_ELEMENTS:
                yield opened[name][...]
                return
            step = max(1, _CHECK_ELEMENTS * entry.shape[0] // (entry.count * multiple)) * multiple
            for start in range(0, entry.shape[0], step):
                yield opened[name][start : start + step]


def _existing_folder(folder: Path) -> Path:
    if not folder.is_dir():
        cause = "is a file, not a model folder" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {cause}; give a folder, a Hub id such as 'org/name', or 'demo'")
    return folder


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is {missing}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _shards(folder: Path) -> tuple[Path, ...]:
    if (folder / SINGLE).is_file():  # transformers too prefers the single file when both are there
        return (folder / SINGLE,)
    if (folder / INDEX).is_file():
        mapping = _read_json(folder / INDEX, "").get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise CheckpointError(f"{folder / INDEX} has no 'weight_map' from tensors to files")
        return tuple(_shard(folder, name) for name in sorted(set(mapping.values())))
    raise CheckpointError(_no_weights(folder))


def _shard(folder: Path, name: str) -> Path:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(f"{folder / INDEX} names '{name}', which lies outside the model's folder")
    if not (folder / relative).is_file():
        raise CheckpointError(f"{folder / INDEX} names '{name}', which is missing: download the model again")
    return folder / relative


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if not pickles:
        return f"{folder} has no safetensors weights ({SINGLE} or {INDEX})"
    return (
        f"{folder} has only pickled weights ({pickles[0]}), which llmprune does not load; convert them with: python -c "
        f"\"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('NEW')\""
    )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again") from None
