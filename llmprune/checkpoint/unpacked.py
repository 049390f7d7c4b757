"""Compressed checkpoints read as the dense ones they stand for: each tensor is unpacked when it is read."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llmprune.checkpoint.format import DENSE_CONFIG, dense_header, is_compressed, require_readable
from llmprune.checkpoint.guard import read_json
from llmprune.checkpoint.header import TensorEntry
from llmprune.checkpoint.packed import Bytes, Layout, count_zero_values, dense_parts, matrix_of, typed_matrix
from llmprune.checkpoint.source import Source, step_of
from llmprune.errors import CheckpointError
from llmprune_kernels.bitmask.layout import expand


def open_dense(folder: str | Path) -> Source:
    """Open a checkpoint, dense or compressed, to read dense tensors from it.

    Raises:
        CheckpointError: as `Source.open`, or it is compressed in a newer format or damaged.
    """
    source = Source.open(folder)
    return Unpacked.of(source) if is_compressed(source.config) else source


@dataclass(frozen=True)
class Unpacked(Source):
    """A compressed checkpoint with the configuration, dtypes and shapes of its dense twin.

    Attributes:
        packed: names of the tensors that are stored packed; `start` and `size` of their entries are as they are stored.
    """

    packed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, source: Source) -> "Unpacked":
        """Return a compressed checkpoint, which was opened as it is stored, in dense terms."""
        require_readable(source)
        fields = {name: field for shard in source.shards for name, field in json.loads(dense_header(shard)).items()}
        if fields.keys() - {"__metadata__"} != source.entries.keys():
            raise CheckpointError(f"{source.folder} is damaged: its tensors are not those it was made of")
        dense = {name: _in_dense_terms(entry, fields[name]) for name, entry in source.entries.items()}
        packed = frozenset(name for name, entry in dense.items() if entry != source.entries[name])
        config = read_json(source.folder, DENSE_CONFIG)
        known = source.identities, source.checksums
        return cls(source.folder, dense, config, source.shards, *known, packed)

    @contextmanager
    def slices(self, names: Iterable[str], copied: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Open the named tensors; one that is packed is unpacked, into memory of its own, when its slice is indexed."""
        with super().slices(names, set(copied) - self.packed) as opened:
            yield {
                name: _Slice(found, self.entries[name]) if name in self.packed else found
                for name, found in opened.items()
            }

    def chunks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Yield the tensor called `name` in pieces, as `Source.chunks` does."""
        if name not in self.packed:
            yield from super().chunks(name, multiple)
            return
        entry = self.entries[name]
        for part in dense_parts(self._stored(entry), name, step_of(entry, multiple)):
            yield part.view(entry.torch_dtype)

    def wasted(self) -> dict[str, int]:
        """Return the zeros that are stored as values, by tensor; compression leaves none."""
        counts = {name: count_zero_values(self._stored(self.entries[name]), name) for name in sorted(self.packed)}
        return {name: count for name, count in counts.items() if count}

    def _stored(self, entry: TensorEntry) -> Bytes:
        """Return the bytes of a packed tensor, its layout checked against the dense header."""
        self.require_unchanged([entry.file])
        stored = np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)
        _require_layout(matrix_of(stored, entry.name)[0], entry)
        return stored


class _Slice:
    """What transformers asks of a slice of safetensors, for a packed tensor."""

    def __init__(self, stored: Any, entry: TensorEntry) -> None:
        self._stored, self._entry = stored, entry

    def get_dtype(self) -> str:
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def __getitem__(self, index: Any) -> Tensor:
        stored: Tensor = self._stored[...]
        layout, matrix = typed_matrix(stored, self._entry.name)
        _require_layout(layout, self._entry)
        return expand(matrix).view(layout.shape)[index]


def _in_dense_terms(entry: TensorEntry, field: dict[str, Any]) -> TensorEntry:
    return replace(entry, dtype=field["dtype"], shape=tuple(field["shape"]))


def _require_layout(layout: Layout, entry: TensorEntry) -> None:
    if (layout.dtype, layout.shape) != (entry.dtype, entry.shape):
        raise CheckpointError(
            f"{entry.name} in {entry.file} is packed as {layout.dtype} {list(layout.shape)}, the header of its file says "
            f"{entry.dtype} {list(entry.shape)}: download or compress it again"
        )
