"""What a run left in its output folder: `llmprune.json`, read back and added to."""

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmprune.checkpoint.sink import REPORT
from llmprune.errors import CheckpointError, RecipeError
from llmprune.recipe import Recipe
from llmprune.runfile import read_run_file

_TOLD = {"method": None, "pattern": None}  # these are told even where they are the defaults
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Recipe)} | _TOLD
_OF_SPEED = (
    "dense",
    "sparse",
    "decode_speedup",
    "prompt_tokens",
    "new_tokens",
    "batch",
    "rounds",
    "device",
    "hardware",
)
_SAME_EVALUATION = ("data", "length", "windows", "convention", "dtype")


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return the `llmprune.json` of an output folder.

    Raises:
        CheckpointError: there is no such folder, it holds no `llmprune.json`, or that one is damaged.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        cause = "it is a file" if Path(folder).is_file() else "there is no such folder"
        cause = "it has no llmprune.json" if Path(folder).is_dir() else cause
        raise CheckpointError(f"{folder} is not an output of llmprune: {cause}")
    return read_run_file(path, "restore it, or prune the model again")


def require_output(folder: str | Path) -> None:
    """Raise CheckpointError, before what takes long, where figures could not be added to an output folder's file."""
    read_run(folder)
    if not os.access(folder, os.W_OK):
        raise CheckpointError(f"{Path(folder) / REPORT} cannot be written: no permission to write in {folder}")


def add_evaluations(folder: str | Path, evaluations: Sequence[dict[str, Any]]) -> None:
    """Add measurements to the `llmprune.json` of an output folder, in place of earlier ones of the same kind.

    Raises:
        CheckpointError: as `read_run`.
    """
    run = read_run(folder)
    kept = [old for old in run.get("evaluations", []) if not any(_same(old, new) for new in evaluations)]
    update_run(folder, evaluations=[*kept, *evaluations])


def add_speed(folder: str | Path, benchmark: dict[str, Any]) -> None:
    """Add what `llmprune bench` measured to the `llmprune.json` of an output folder.

    Raises:
        CheckpointError: as `read_run`.
    """
    update_run(folder, speed={name: benchmark[name] for name in _OF_SPEED if name in benchmark})


def update_run(folder: str | Path, **fields: Any) -> None:
    """Set fields of the `llmprune.json` of an output folder, all at once or not at all.

    Raises:
        CheckpointError: as `read_run`.
    """
    replace_text(Path(folder) / REPORT, json_text(read_run(folder) | fields))


def replace_text(path: Path, text: str) -> None:
    """Write a text file, all at once or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        error.filename = str(path)  # the name that the user knows
        raise


def require_file(path: Path, suffix: str) -> None:
    """Raise RecipeError for a file that the user has named, and that cannot be written there, or is of another kind."""
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: give the name of a file, such as {path / f'figures{suffix}'}")
    if path.suffix != suffix:
        raise RecipeError(f"{path} would hold no such file as its name says: give a name that ends in {suffix}")
    if not path.parent.is_dir():
        raise RecipeError(f"{path} cannot be written: there is no folder {path.parent}; make it first")


def json_text(run: dict[str, Any]) -> str:
    """Return what `llmprune.json` holds as the text of that file."""
    return json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def command_of(run: dict[str, Any], model: str | None = None, out: str = "OUT") -> str:
    """Return the command line that repeats a run: its method, its pattern, and every option that is no default."""
    recipe = run["recipe"]
    if run.get("one_pass"):  # a comma, even after a single one, asks for a pass through the dense model
        recipe = recipe | {"pattern": f"{recipe['pattern']},"}  # in which no result depends on the others
    words = ["llmprune", "prune", model or str(run["model"]), out]
    for name in ("method", "pattern", *(name for name in recipe if name not in ("method", "pattern"))):
        words += _words(name, recipe[name])
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is None or value == _DEFAULTS.get(name) or value in ((), []):
        return []
    if isinstance(value, bool):
        return [option] if value else []
    if name == "sparsities":
        return [word for glob, share in value.items() for word in ("--sparsity", f"{glob}={share}")]
    if name == "overrides":
        return ["--recipe", "OVERRIDES.yaml"] if value else []
    if isinstance(value, dict):
        return [word for key, entry in value.items() for word in ("--method-option", f"{key}={entry}")]
    if isinstance(value, list):
        return [word for entry in value for word in (option, str(entry))]
    return [option, str(value)]


def _same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old.get(name) == new.get(name) for name in _SAME_EVALUATION)
