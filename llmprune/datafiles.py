"""Local data files with the standard library: their bytes, their text, their rows of JSON."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from llmprune.errors import DataError

TEXT_SUFFIXES = (".txt", ".text", ".raw", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".parquet")

_MOST_UNPACKED = 100  # times its own size that a gzip file may unpack to; honest text stays below 20
_SMALL_BYTES = 1 << 24  # to which any file may unpack


def suffix(path: Path) -> str:
    """Return the suffix that tells the format, without that of gzip, in small letters."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def contents(name: str, path: Path) -> bytes:
    """Return the bytes of the file at `path`, gunzipped where its name ends in .gz.

    `name` is what error messages call the file, here and below.

    Raises:
        DataError: there is no such file, it is a folder, empty, or cannot be read.
    """
    try:
        data = _unpacked(name, path) if path.suffix.lower() == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name} is a folder; give a file in it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{name} is not a complete gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    if not data or data.isspace():
        raise DataError(f"{name} is empty")
    return data


def _unpacked(name: str, path: Path) -> bytes:
    limit = max(_SMALL_BYTES, _MOST_UNPACKED * path.stat().st_size)
    with gzip.open(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{name} unpacks to more than {_MOST_UNPACKED} times its size, which no text does")
    return data


def decoded(name: str, data: bytes) -> str:
    """Return `data` as text, line ends and all as they are.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def json_lines(name: str, text: str) -> list[Any]:
    """Return the values of JSON lines; blank lines are passed over.

    Raises:
        DataError: a line is not JSON; the message has its number.
    """
    # Not splitlines(): a JSON string may hold other line ends, such as U+2028, as they are.
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    return [_value(name, line, number) for number, line in lines if line.strip()]


def json_rows(name: str, text: str) -> list[Any] | dict[str, Any]:
    """Return what a .json file holds: an array, an object, or the values of JSON lines under a wrong name.

    Raises:
        DataError: it is not JSON; the message has the number of the line.
    """
    text = text.removeprefix("\ufeff")
    start, _, rest = text.strip().partition("\n")
    if start.startswith("{") and start.rstrip().endswith("}") and rest:
        return json_lines(name, text)
    value = _value(name, text, 1)
    if not isinstance(value, (list, dict)):
        raise DataError(f"{name} holds one {type(value).__name__}; expected an array of objects")
    return value


def _value(name: str, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{name}, line {first_line + error.lineno - 1}"
        raise DataError(f"{place} is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{name}, line {first_line} is JSON nested too deeply") from None
