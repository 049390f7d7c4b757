"""What is told of a run in public: where files lay on the user's machine is nobody's business, so paths become names."""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from llmprune.datafiles import SUFFIXES, suffix

_MAY_BE_PATHS = {"model", "dense", "data", "calibration", "allocation", "by"}  # fields of llmprune.json at any depth
_ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?(?:/[^\s/'\",;:()]+){2,}")  # within a text


def private_names(run: dict[str, Any], base: str | None) -> dict[str, str]:
    """Return every local path that a run tells, with the name that may stand for it; the longest come first.

    Args:
        run: what `llmprune.json` holds.
        base: the base model's id on the Hub, None where it is on no Hub.
    """
    found = {text for text in _texts(run, _MAY_BE_PATHS) if _is_local(text)}
    found |= {path for text in _texts(run) for path in _ABSOLUTE.findall(text)}
    if run["model"] != base:  # such as the folder models/llama, which looks like an id
        found.add(str(run["model"]))
    found |= {str(Path(path)) for path in found}  # without a slash at its end
    names = {path: Path(path).name for path in sorted(found, key=len, reverse=True)}
    return {path: name for path, name in names.items() if name and name != path}


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """Return plain values, nested as they may be, with names in place of the paths in their texts."""
    if isinstance(value, dict):
        return {key: without_paths(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_paths(entry, names) for entry in value]
    if isinstance(value, str):
        for path, name in names.items():
            start = "" if path.startswith(("/", "~")) else r"(?<![\w./~-])"  # `m/` is no part of `llm/`
            value = name.join(re.split(start + re.escape(path), value))
    return value


def page_without_paths(page: str, names: dict[str, str]) -> str:
    """Return a page of HTML with names in place of the paths."""
    return str(without_paths(page, {escape(path): escape(name) for path, name in names.items()}))


def _texts(value: Any, keys: set[str] | None = None) -> Iterator[str]:
    """Yield the texts in plain values; with `keys` only those that are the values of these fields."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(entry, str):
                yield from _texts(entry, keys)
            elif keys is None or key in keys:
                yield entry
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, keys)
    elif isinstance(value, str) and keys is None:
        yield value


def _is_local(text: str) -> bool:
    """Say whether what a user gave as a model or as data is a path, as it is read; else it is a name or a Hub id."""
    path = Path(text)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        return True
    return path.name != text and (path.exists() or suffix(path) in SUFFIXES)
