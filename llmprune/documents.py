"""Rows of text, of chat messages or of token ids: which column holds them, and are they what they should be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.errors import DataError

COLUMNS = {
    "input_ids": "input_ids",
    "messages": "messages",
    "conversations": "messages",
    "text": "text",
    "content": "text",
    "sentence": "text",
}
"""The columns that are read, the first choice first, and the kind of their rows."""

_EXPECTED = {"text": "text", "messages": "a list of messages with role and content", "input_ids": "a list of token ids"}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Documents:
    """Rows of one kind, and how they belong together.

    Attributes:
        name: the data as the caller named it.
        kind: "text", "messages" or "input_ids".
        rows: per row a str, a list of messages (dicts with role and content), or a list of token ids.
        joined: True: the rows are pieces of one text. False: each row is a document of its own.
        separator: what the pieces of one text are joined with; empty for separate documents.
    """

    name: str
    kind: str
    rows: Sequence[Any]
    joined: bool
    separator: str


def from_rows(name: str, rows: list[Any] | dict[str, Any], separator: str | None) -> Documents:
    """Return documents of JSON values or of rows from Python: objects with columns, or the values of one column.

    An object in place of the rows is a row itself, or holds one list of rows. Text is joined with `separator`; where
    that is None every row stays a document.

    Raises:
        DataError: there are no rows, no known column, or a value is of the wrong type.
    """
    rows = _unwrapped(name, rows) if isinstance(rows, dict) else rows
    if not rows:
        raise DataError(f"{name} is empty")
    first = rows[0]
    if isinstance(first, dict):
        column = choose_column(name, list(first))
        rows = [row.get(column) if isinstance(row, dict) else row for row in rows]
    elif isinstance(first, list):
        column = "messages" if first and isinstance(first[0], dict) else "input_ids"
    else:
        column = "text"
    return from_values(name, column, rows, separator)


def from_values(name: str, column: str, values: list[Any], separator: str | None) -> Documents:
    """Return documents of the `values` of one of `COLUMNS`; see `from_rows` for `separator`.

    Raises:
        DataError: a value is of the wrong type; the message names its row.
    """
    kind = COLUMNS[column]
    rows = [_messages(value) for value in values] if kind == "messages" else values
    for number, row in enumerate(rows, start=1):
        if not _fits(kind, row):
            raise DataError(f"{name}: '{column}' of row {number} is not {_EXPECTED[kind]} ({_sketch(row)})")
    joined = kind == "text" and separator is not None
    return Documents(name, kind, rows, joined, separator if joined and separator else "")


def choose_column(name: str, columns: list[str]) -> str:
    """Return the first of `COLUMNS` that is among `columns`.

    Raises:
        DataError: none is.
    """
    for column in COLUMNS:
        if column in columns:
            return column
    raise DataError(f"{name} has the columns {', '.join(columns)}; expected one of {', '.join(COLUMNS)}")


def _unwrapped(name: str, value: dict[str, Any]) -> list[Any]:
    if COLUMNS.keys() & value.keys():
        return [value]
    lists = [entry for entry in value.values() if isinstance(entry, list)]
    if len(lists) != 1:
        raise DataError(f"{name} is an object that holds {len(lists)} lists; expected one list of rows")
    return lists[0]


def _messages(conversation: Any) -> Any:
    """Return a conversation with the keys role and content, also where it has those of ShareGPT, from and value."""
    if not isinstance(conversation, list):
        return conversation
    return [_message(message) for message in conversation]


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    return {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}


def _fits(kind: str, row: Any) -> bool:
    if kind == "text":
        return isinstance(row, str)
    if not isinstance(row, list) or not row:
        return False
    if kind == "messages":
        return all(isinstance(entry, dict) and {"role", "content"} <= entry.keys() for entry in row)
    return all(type(entry) is int and abs(entry) < 2**63 for entry in row)


def _sketch(row: Any) -> str:
    """Return a few words on what `row` is instead."""
    if isinstance(row, list) and row:
        return f"it is a list that starts with a {type(row[0]).__name__}"
    return "it is an empty list" if row == [] else f"it is a {type(row).__name__}"
