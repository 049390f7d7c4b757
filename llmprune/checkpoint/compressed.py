"""A pruned checkpoint made smaller on disk, and back, byte for byte.

The compressed folder has the files, shards and tensor names of the dense one. Tensors that become smaller are stored
packed (`packed.py`) as one row of bytes; `config.json` names the format where loaders look for a quantization, and the
dense one is kept beside it as `config.dense.json`. Every shard holds the header of its dense twin in its metadata, so
that `decompress` restores that file, its key order and its spacing included.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmprune.checkpoint import durable
from llmprune.checkpoint.folder import appearing
from llmprune.checkpoint.format import (
    DENSE_CONFIG,
    DENSE_HEADER,
    compressed_config,
    dense_header,
    header_text,
    is_compressed,
    metadata_of,
    require_readable,
)
from llmprune.checkpoint.header import TensorEntry, read_header
from llmprune.checkpoint.packed import Bytes, Layout, can_pack, matrix_of, pack, values_of
from llmprune.checkpoint.place import require_place
from llmprune.checkpoint.source import CONFIG, Source
from llmprune.errors import CheckpointError
from llmprune.progress import Progress
from llmprune_kernels.bitmask.layout import expand

_ALIGNED = 8  # bytes: where tensors and headers begin


@dataclass(frozen=True)
class Sizes:
    """What compression came to: tensors packed, and the bytes of those tensors and of all files of weights."""

    packed: int
    tensor_bytes: tuple[int, int]  # dense, packed
    file_bytes: tuple[int, int]  # dense, compressed

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return {
            "packed_tensors": self.packed,
            "dense_bytes": self.tensor_bytes[0],
            "packed_bytes": self.tensor_bytes[1],
            "dense_file_bytes": self.file_bytes[0],
            "compressed_file_bytes": self.file_bytes[1],
        }

    def __str__(self) -> str:
        tensors = self.tensor_bytes[1] / max(self.tensor_bytes[0], 1)
        files = self.file_bytes[1] / max(self.file_bytes[0], 1)
        return f"{self.packed} tensors packed to {tensors:.4f} of their size, the weight files to {files:.4f}"


def compress(folder: Path, out: Path, overwrite: bool = False) -> Sizes:
    """Write the compressed twin of a pruned checkpoint folder to `out`.

    Raises:
        CheckpointError: the folder is no readable checkpoint, is compressed or quantized already, has no tensor that
            would become smaller, or the output cannot be written.
    """
    source = Source.open(folder)
    _require_dense(source)
    require_place(source, out, overwrite)
    packed = _packed_sizes(source.entries.values())
    if not packed:
        raise CheckpointError(f"{folder} has no zeros that compression could leave out: prune it first")
    with appearing(out) as partial, Progress(len(source.shards), "compressing", "file") as bar:
        _copy_companions(source, partial, leave=(CONFIG,))
        shutil.copyfile(folder / CONFIG, partial / DENSE_CONFIG)
        (partial / CONFIG).write_text(compressed_config(source.config), "utf-8")
        for shard in source.shards:
            _compress_shard(shard, partial / shard.relative_to(folder), packed)
            bar.step()
        written = sum((partial / shard.relative_to(folder)).stat().st_size for shard in source.shards)
    dense = sum(source.entries[name].size for name in packed)
    read = sum(shard.stat().st_size for shard in source.shards)
    return Sizes(len(packed), (dense, sum(packed.values())), (read, written))


def compress_shards(shards: Iterable[Path]) -> None:
    """Compress files of weights where they lie, one after another; one that is compressed already stays as it is.

    At any moment each file is whole, dense or compressed: a crash in between is made good by doing the same again.
    """
    shards = list(shards)
    with Progress(len(shards), "compressing", "file") as bar:
        for shard in shards:
            if DENSE_HEADER not in metadata_of(shard):
                small = shard.with_name(f"{shard.name}.small")
                _compress_shard(shard, small, _packed_sizes(read_header(shard)))
                durable.sync(small)
                os.replace(small, shard)
            bar.step()


def least_sparsity(size: int) -> float:
    """Return the share of zeros above which a matrix with elements of `size` bytes becomes smaller."""
    return 1 / (8 * size)


def size_in_bytes(folder: Path) -> tuple[int, int]:
    """Return the bytes of a pruned checkpoint's dense tensors, and those that `compress` leaves, writing nothing.

    Of a compressed checkpoint the headers say both; a dense one is read.

    Raises:
        CheckpointError: the folder is no readable checkpoint, or is quantized.
    """
    source = Source.open(folder)
    entries = source.entries.values()
    if is_compressed(source.config):
        return sum(map(_dense_bytes, source.shards)), sum(entry.size for entry in entries)
    _require_dense(source)
    return sum(entry.size for entry in entries), sum(min(entry.size, _packed_size(entry)) for entry in entries)


def decompress(folder: Path, out: Path, overwrite: bool = False) -> None:
    """Restore the dense checkpoint that `compress` made `folder` of.

    Raises:
        CheckpointError: the folder is not such a checkpoint, is of a newer format or damaged, or the output cannot be
            written.
    """
    source = Source.open(folder)
    require_readable(source)
    headers = {shard: dense_header(shard) for shard in source.shards}
    require_place(source, out, overwrite)
    with appearing(out) as partial, Progress(len(source.shards), "decompressing", "file") as bar:
        _copy_companions(source, partial, leave=(CONFIG, DENSE_CONFIG))
        shutil.copyfile(folder / DENSE_CONFIG, partial / CONFIG)
        for shard, header in headers.items():
            _decompress_shard(shard, header, partial / shard.relative_to(folder))
            bar.step()


def _require_dense(source: Source) -> None:
    if is_compressed(source.config):
        raise CheckpointError(f"{source.folder} is compressed already")
    if source.config.get("quantization_config") or source.config.get("compression_config"):
        raise CheckpointError(f"{source.folder} is quantized: only plain checkpoints can be compressed")


def _copy_companions(source: Source, target: Path, leave: tuple[str, ...]) -> None:
    for path in source.companions():
        if path.name not in leave:
            shutil.copyfile(path, target / path.name)


def _packed_sizes(entries: Iterable[TensorEntry]) -> dict[str, int]:
    """Return the bytes that tensors take packed, of those that are smaller then."""
    return {entry.name: size for entry in entries if (size := _packed_size(entry)) < entry.size}


def _packed_size(entry: TensorEntry) -> int:
    """Return the bytes that a tensor would take packed, its own size where it cannot be."""
    if not can_pack(entry.shape, entry.count, entry.size):
        return entry.size
    layout = _layout(entry)
    return layout.packed_bytes(values_of(_read(entry), layout.size))


def _layout(entry: TensorEntry) -> Layout:
    return Layout.of(entry.dtype, entry.shape, entry.size // entry.count)


def _compress_shard(shard: Path, target: Path, packed: dict[str, int]) -> None:
    entries = read_header(shard)
    text = header_text(shard)
    metadata = {**json.loads(text).get("__metadata__", {}), DENSE_HEADER: text}
    fields: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for entry in entries:
        size = packed.get(entry.name, entry.size)
        form = ("U8", [size]) if entry.name in packed else (entry.dtype, list(entry.shape))
        fields[entry.name] = {"dtype": form[0], "shape": form[1], "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    _write(target, header + b" " * (-len(header) % _ALIGNED), _compressed_parts(entries, packed))


def _compressed_parts(entries: list[TensorEntry], packed: dict[str, int]) -> Iterator[Bytes]:
    for entry in entries:
        yield pack(_read(entry), _layout(entry)) if entry.name in packed else _read(entry)


def _decompress_shard(shard: Path, header: str, target: Path) -> None:
    stored = {entry.name: entry for entry in read_header(shard)}
    fields = json.loads(header)
    dense = {name: field for name, field in fields.items() if name != "__metadata__"}
    in_order = sorted(dense, key=lambda name: dense[name]["data_offsets"][0])
    if dense.keys() != stored.keys():
        raise CheckpointError(f"{shard} is damaged: its tensors are not those it was made of; compress it again")
    _write(target, header.encode(), (_dense_part(stored[name], dense[name]) for name in in_order))


def _dense_part(entry: TensorEntry, field: dict[str, Any]) -> Bytes:
    """Return the bytes of a tensor as the dense file has them."""
    data = _read(entry)
    if (entry.dtype, list(entry.shape)) != (field["dtype"], field["shape"]):
        layout, matrix = matrix_of(data, entry.name)
        if (layout.dtype, list(layout.shape)) != (field["dtype"], field["shape"]):
            raise CheckpointError(f"{entry.name} in {entry.file} is damaged: compress the checkpoint again")
        data = expand(matrix).numpy().reshape(-1).view(np.uint8)
    begin, end = field["data_offsets"]
    if len(data) != end - begin:
        raise CheckpointError(f"{entry.name} in {entry.file} is damaged: compress the checkpoint again")
    return data


def _dense_bytes(shard: Path) -> int:
    """Return the bytes of the tensors of the dense file that a compressed one was made of."""
    fields = json.loads(dense_header(shard))
    return max((entry["data_offsets"][1] for name, entry in fields.items() if name != "__metadata__"), default=0)


def _read(entry: TensorEntry) -> Bytes:
    return np.fromfile(entry.file, np.uint8, entry.size, offset=entry.start)


def _write(target: Path, header: bytes, parts: Iterator[Bytes]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for part in parts:
            file.write(part.data)
