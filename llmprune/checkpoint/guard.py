"""What a checkpoint's folder, which may come from anybody, must not make us read or copy."""

import json
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError

MAX_JSON_BYTES = 32 << 20  # an index of 100,000 experts takes a third of it
MAX_COMPANION_BYTES = 256 << 20  # the largest tokenizer in use takes an eighth of it


def require_inside(folder: Path, path: Path) -> Path:
    """Return `path` if following its links does not leave `folder`.

    The one exception is the Hub's cache, whose snapshots are links into the `blobs` of the same repository.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    home, real = folder.resolve(), path.resolve()
    homes = [home, (home.parent.parent / "blobs").resolve()] if home.parent.name == "snapshots" else [home]
    if not any(place in real.parents for place in homes):
        raise CheckpointError(f"{path} is a link out of the model's folder: put the file itself there")
    return path


def require_modest(path: Path, limit: int = MAX_COMPANION_BYTES) -> Path:
    """Return `path` if its file is not larger than any honest file of its kind.

    Raises:
        CheckpointError: it is.
    """
    size = path.stat().st_size
    if size > limit:
        raise CheckpointError(f"{path} has {size / 1e9:.2f} GB, and no more than {limit / 1e9:.2f} are read: remove it")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a model's folder.

    Raises:
        CheckpointError: the file is a link out of the folder, too large, or does not hold a JSON object.
    """
    path = require_modest(require_inside(folder, folder / name), MAX_JSON_BYTES)
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
