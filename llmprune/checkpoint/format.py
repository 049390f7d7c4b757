"""How a compressed checkpoint is told: what its `config.json` says, and the headers of the dense files in its own."""

import json
import struct
from pathlib import Path
from typing import Any

from llmprune.checkpoint.source import Source, read_fields
from llmprune.errors import CheckpointError

METHOD = "llmprune"
FORMAT, FORMAT_VERSION = "bitmask", 1
DENSE_CONFIG = "config.dense.json"
DENSE_HEADER = "llmprune.dense_header"  # in the metadata of a shard


def is_compressed(config: dict[str, Any]) -> bool:
    """Say whether a checkpoint's configuration is that of a compressed one."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def holds_compressed(folder: Path) -> bool:
    """Say whether a folder holds a compressed checkpoint.

    Raises:
        CheckpointError: as `read_fields`.
    """
    return is_compressed(read_fields(folder))


def require_readable(source: Source) -> None:
    """Raise CheckpointError unless the checkpoint is compressed in a format that this llmprune reads."""
    if not is_compressed(source.config):
        raise CheckpointError(f"{source.folder} is not compressed by llmprune: nothing to decompress")
    require_version(source.config["quantization_config"], str(source.folder))
    if not (source.folder / DENSE_CONFIG).is_file():
        raise CheckpointError(f"{source.folder} lacks {DENSE_CONFIG}: download or compress it again")


def require_version(quantization: dict[str, Any], name: str) -> None:
    """Raise CheckpointError for a format that only a newer llmprune knows."""
    found = (quantization.get("format"), quantization.get("version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{name} is compressed in format {found[0]} {found[1]}, this llmprune reads {FORMAT} {FORMAT_VERSION}: "
            "upgrade it"
        )


def compressed_config(config: dict[str, Any]) -> str:
    """Return the config.json of a compressed checkpoint, given what that of the dense one holds."""
    description = {"quant_method": METHOD, "format": FORMAT, "version": FORMAT_VERSION}
    return json.dumps(config | {"quantization_config": description}, indent=2, ensure_ascii=False) + "\n"


def dense_header(shard: Path) -> str:
    """Return the header of the dense file that a compressed one was made of.

    Raises:
        CheckpointError: it is not there.
    """
    metadata = metadata_of(shard)
    if DENSE_HEADER not in metadata:
        raise CheckpointError(f"{shard} lacks the header of its dense twin: compress the checkpoint again")
    return str(metadata[DENSE_HEADER])


def metadata_of(shard: Path) -> dict[str, str]:
    """Return what a safetensors file that `read_header` has found sound says beside its tensors."""
    metadata: dict[str, str] = json.loads(header_text(shard)).get("__metadata__", {})
    return metadata


def header_text(shard: Path) -> str:
    """Return the header of a safetensors file that `read_header` has found sound, its spacing included."""
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode()
