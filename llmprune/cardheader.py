"""The header of a model card: the YAML between two lines of three dashes with which a README.md on the Hub begins."""

import re
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError, first_line

_HEADER = re.compile(r"\A(\s*---[ \t]*\r?\n)(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a card; none where it has no header.

    Raises:
        CheckpointError: the card is no text, or its header no YAML mapping.
    """
    import yaml

    try:
        found = _HEADER.match(path.read_text("utf-8-sig"))
        values = yaml.safe_load(found[2]) if found else None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start}): convert it, then push again") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no date of a calendar
        assert found is not None
        raise CheckpointError(f"{path}, {_place(error, found)}: mend its header, then push again") from None
    if not isinstance(values, dict | None):
        raise CheckpointError(f"{path}, line 2: its header maps no names to values: mend it, then push again")
    return values or {}


def _place(error: Exception, header: re.Match[str]) -> str:
    """Return the line of the file at which the header cannot be read, and why."""
    mark, position = getattr(error, "problem_mark", None), getattr(error, "position", 0)
    before = header[1].count("\n") + (mark.line if mark else header[2].count("\n", 0, position))
    cause = getattr(error, "problem", None) or first_line(error)
    return f"line {before + 1}: no valid YAML ({cause})"
