"""Plain values, as JSON has them, checked against the types that their reader relies on.

Types are those of Python: `str`, `bool`, `float` (any number), `int` (a whole one from 0 on), `list[T]`, `dict[str, T]`,
`tuple[T, T]` for a list of so many, `T | None`, and a `TypedDict` or a dataclass for an object that has these fields.
What other fields an object has is not looked at.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

_WORDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}
_MOST: dict[Any, float] = {int: sys.maxsize, float: 1e100}  # no honest figure is larger, and sums of these are finite


def fault_in(value: Any, kind: Any) -> str | None:
    """Return where a value is first found not to be of a type, and why, in words; None where it is."""
    return next(_faults(value, kind, ""), None)


def fields_of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the values that a dataclass has fields for, by which it is made."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


def _faults(value: Any, kind: Any, where: str) -> Iterator[str]:
    whole, parts = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return
    if isinstance(kind, UnionType):
        found = [next(_faults(value, part, where), "") for part in parts if part is not NoneType or value is None]
        yield from found[:1] if all(found) else []
    elif is_typeddict(kind) or dataclasses.is_dataclass(kind):
        yield from _faults_of_object(value, kind, where)
    elif not _is(value, whole):
        name = where.lstrip(".") or "it"
        yield f"{name} must be {_WORDS[whole]}, not {_shown(value, whole)}"
    elif whole is tuple:
        if len(value) != len(parts):
            yield f"{where.lstrip('.')} must have {len(parts)} entries, not {len(value)}"
        for place, (entry, part) in enumerate(zip(value, parts, strict=False)):
            yield from _faults(entry, part, f"{where}[{place}]")
    elif whole is list and parts:
        for place, entry in enumerate(value):
            yield from _faults(entry, parts[0], f"{where}[{place}]")
    elif whole is dict and parts:
        for key, entry in value.items():
            yield from _faults(entry, parts[1], f"{where}['{key}']")


def _faults_of_object(value: Any, kind: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield from _faults(value, dict, where)
        return
    for name, part in _hints(kind).items():
        if name in value:
            yield from _faults(value[name], part, f"{where}.{name}")
        elif name in _required(kind):
            yield f"{where}.{name}".lstrip(".") + " is missing"


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _required(kind: Any) -> frozenset[str]:
    if is_typeddict(kind):
        return frozenset(kind.__required_keys__)
    without = dataclasses.MISSING
    return frozenset(
        field.name for field in dataclasses.fields(kind) if field.default is field.default_factory is without
    )


def _is(value: Any, kind: Any) -> bool:
    if kind in _MOST:
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and (0 if kind is int else -_MOST[kind]) <= value <= _MOST[kind]
    return isinstance(value, list if kind is tuple else kind)


def _shown(value: Any, wanted: Any) -> str:
    """Return the kind of a value in words, or the value itself where its kind is the one that is wanted."""
    if isinstance(value, int | float) and not isinstance(value, bool) and wanted in _MOST:
        return f"{value:.6g}" if isinstance(value, float) else "one so large or below 0"
    return _WORDS[type(value)]
