"""From what a user calls a model to a folder on disk."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from llmprune import hub
from llmprune.checkpoint.source import DOWNLOADED
from llmprune.errors import CheckpointError

DEMO = "demo"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(model: str | Path, revision: str | None = None, patterns: Sequence[str] = DOWNLOADED) -> Path:
    """Return the folder of a model given as a folder, a Hub id, or the word `demo`.

    Of a model on the Hub the files are fetched whose names match `patterns`.

    Raises:
        CheckpointError: there is no such folder, or the Hub does not have it, or cannot be reached.
    """
    if model == DEMO:
        return demo_folder()
    path = Path(model).expanduser()
    if path.exists():
        return path
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise CheckpointError(f"{model}: no such folder; give a folder, a Hub id such as 'org/name', or '{DEMO}'")
    return hub.fetch_model(model, revision, list(patterns))


def require_own_name(out: Path) -> None:
    """Raise CheckpointError for an output that nobody could refer to afterwards: `demo` is the shipped model."""
    if str(out) == DEMO:
        raise CheckpointError(f"output '{DEMO}' would be mistaken for the shipped model of that name: choose another")


def require_folder(out: Path) -> None:
    """Raise CheckpointError for the folder of several results that cannot become one: a file or a model is there."""
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise CheckpointError(f"output {out}: {file} is a file, and a folder is needed there: choose another place")
    if (out / "config.json").exists():
        raise CheckpointError(f"output {out} is a model folder: choose another one")
    require_own_name(out)


def demo_folder() -> Path:
    """Return the folder of the model that ships with llmprune."""
    return Path(str(files("llmprune") / "demo"))
