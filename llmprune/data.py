"""What to calibrate or to evaluate on: a name, a file or rows from Python become documents.

Plain text and JSON are read with the standard library; `datasets` is needed for the Hub and for parquet only.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from llmprune import datafiles, documents, hub
from llmprune.documents import Documents
from llmprune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets

Purpose: TypeAlias = Literal["calibration", "evaluation"]

__all__ = ["Documents", "Purpose", "read"]

_OPTIONS = {"calibration": "--calibration FILE", "evaluation": "--data FILE"}
_SPLITS = {"calibration": ("train",), "evaluation": ("test", "validation", "train")}
_SEPARATORS: dict[str, str | None] = {"calibration": None, "evaluation": "\n\n"}
# The Penn Treebank as Mikolov gave it out, a sentence a line: put together as the rows of the same data on the Hub.
_PTB_FILE = re.compile(r"ptb(\.(train|valid|test))?\.txt(\.gz)?", re.IGNORECASE)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class _Source:
    """Where a data set lies on the Hub, and how the papers put its rows together."""

    repo: str
    config: str | None = None
    file: str | None = None
    revision: str | None = None
    split: str | None = None
    separator: str | None = None
    first: int | None = None


# PTB is taken from the Hub's own parquet branch, as its main branch is a script, which `datasets` no longer runs.
_SOURCES = {
    ("wikitext2", "calibration"): _Source("Salesforce/wikitext", "wikitext-2-raw-v1", separator=" "),
    ("wikitext2", "evaluation"): _Source("Salesforce/wikitext", "wikitext-2-raw-v1", separator="\n\n"),
    ("ptb", "calibration"): _Source(
        "ptb-text-only/ptb_text_only", None, "penn_treebank/train/*.parquet", "refs/convert/parquet", separator=" "
    ),
    ("ptb", "evaluation"): _Source(
        "ptb-text-only/ptb_text_only", None, "penn_treebank/test/*.parquet", "refs/convert/parquet", separator=" "
    ),
    ("c4", "calibration"): _Source("allenai/c4", file="en/c4-train.00000-of-01024.json.gz"),
    ("c4", "evaluation"): _Source(
        "allenai/c4", file="en/c4-validation.00000-of-00008.json.gz", separator=" ", first=1100
    ),
}


def read(spec: "str | Path | Sequence[Any] | torch.Tensor | datasets.Dataset", purpose: Purpose) -> Documents:
    """Return the documents that `spec` names, put together as the papers do for `purpose`.

    `spec` is `demo` (excerpts of WikiText-2 that come with llmprune), `wikitext2`, `ptb`, `c4`, a data set on the Hub
    (`org/name`, `org/name:config` or `org/name:config:split`), a local file (text, jsonl, json, parquet, or one of
    those gzipped), a list of texts, conversations or token id lists, an integer tensor [samples, length], or a
    `datasets.Dataset`. The lines of a file called `ptb.txt`, `ptb.test.txt`, `ptb.valid.txt` or
    `ptb.train.txt`, gzipped or not, are joined with a space, as the papers join the sentences of the Penn Treebank. Of
    several columns `input_ids` is taken before `messages` before `text`.

    Raises:
        DataError: the name is unknown, or the data is missing, empty, unreadable or of the wrong type.
    """
    if isinstance(spec, str):
        return _from_name(spec, purpose)
    if isinstance(spec, Path):
        return _from_file(str(spec), spec, purpose)
    if isinstance(spec, torch.Tensor):
        return _from_tensor(spec)
    if isinstance(spec, (list, tuple)):
        rows = [row.tolist() if isinstance(row, torch.Tensor) else row for row in spec]
        return documents.from_rows(f"a list of {len(rows)} rows", rows, _SEPARATORS[purpose])
    if isinstance(spec, _import_datasets().Dataset):
        return _from_dataset(f"a dataset of {len(spec)} rows", spec, _SEPARATORS[purpose])
    raise DataError(f"data cannot be a {type(spec).__name__}; pass a name, a file, a list, a tensor or a Dataset")


def _from_name(spec: str, purpose: Purpose) -> Documents:
    if spec == "demo":
        return _demo(purpose)
    if (spec, purpose) in _SOURCES:
        return _from_hub(spec, _SOURCES[spec, purpose], purpose)
    path = Path(spec).expanduser() if spec.startswith("~") else Path(spec)
    if (
        (spec and os.path.exists(path))
        or spec.startswith((".", "/", "~"))
        or datafiles.suffix(path) in datafiles.SUFFIXES
    ):
        return _from_file(spec, path, purpose)
    named = _HUB_ID.fullmatch(spec)
    if named is None:
        near = did_you_mean(spec, {"demo", *(name for name, _ in _SOURCES)})
        raise DataError(f"unknown data '{spec}': give a file, a data set on the Hub as org/name, or a name; {near}")
    repo, config, split = named.groups()
    if repo == "allenai/c4" and config in (None, "en") and split is None:  # hundreds of gigabytes: one file will do
        return _from_name("c4", purpose)
    return _from_hub(spec, _Source(repo, config, split=split, separator=_SEPARATORS[purpose]), purpose)


def _demo(purpose: Purpose) -> Documents:
    data = (files("llmprune") / "demo" / f"wikitext2-{purpose}.jsonl").read_bytes()
    return documents.from_rows(
        "demo", datafiles.json_lines("demo", datafiles.decoded("demo", data)), _SOURCES["wikitext2", purpose].separator
    )


def _from_tensor(tensor: torch.Tensor) -> Documents:
    shape = tuple(tensor.shape)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if len(shape) != 2 or 0 in shape or not whole:
        raise DataError(f"a data tensor must hold token ids as integers [samples, length], not {tensor.dtype} {shape}")
    return Documents(f"a tensor of {shape[0]} rows", "input_ids", tensor.tolist(), False, "")


def _from_file(name: str, path: Path, purpose: Purpose) -> Documents:
    suffix, separator = datafiles.suffix(path), _SEPARATORS[purpose]
    if path.is_file() and suffix not in datafiles.SUFFIXES:
        known = ", ".join(datafiles.SUFFIXES)
        raise DataError(f"{name}: unknown kind of file '{path.suffix}'; known: {known}, each also with .gz")
    data = datafiles.contents(name, path)
    if suffix == ".parquet":
        return _from_dataset(name, _parquet(name, data), separator)
    text = datafiles.decoded(name, data)
    if _PTB_FILE.fullmatch(path.name):
        return documents.from_rows(name, [line.strip() for line in text.splitlines()], " ")
    if suffix in datafiles.TEXT_SUFFIXES:
        return Documents(name, "text", [text], True, "")
    value = datafiles.json_lines(name, text) if suffix == ".jsonl" else datafiles.json_rows(name, text)
    return documents.from_rows(name, value, separator)


def _import_datasets() -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError:
        raise DataError("data from the Hub and parquet files need datasets: pip install datasets") from None


def _parquet(name: str, data: bytes) -> "datasets.Dataset":
    module = _import_datasets()
    # A folder of its own: the cache of `datasets` would keep a converted copy of every file for good.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "data.parquet"
        copy.write_bytes(data)
        try:
            table: datasets.Dataset = module.Dataset.from_parquet(str(copy), cache_dir=folder, keep_in_memory=True)
        except Exception as error:  # pyarrow and datasets have no error class in common
            raise DataError(f"{name} is not a readable parquet file ({hub.brief(error)})") from None
    return table


def _from_hub(name: str, source: _Source, purpose: Purpose) -> Documents:
    module = _import_datasets()
    online = hub.reachable()
    try:
        with nullcontext() if online else hub.offline(module.config):
            splits = module.load_dataset(
                source.repo,
                source.config,
                data_files=None if source.file is None else {"train": source.file},
                revision=source.revision,
            )
    except Exception as error:  # any class: ConnectionError, ValueError, those of pyarrow and of the transport
        cause = f"{source.repo}: {hub.brief(error)}" if online else f"{hub.obstacle()}, nor is {source.repo} cached"
        raise DataError(f"cannot read '{name}' ({cause}); pass a local file: {_OPTIONS[purpose]}") from error
    table = splits[_split(name, source.split, purpose, list(splits))]
    if source.first is not None:
        table = table.select(range(min(source.first, len(table))))
    return _from_dataset(name, table, source.separator)


def _split(name: str, wanted: str | None, purpose: Purpose, known: list[str]) -> str:
    for split in _SPLITS[purpose] if wanted is None else (wanted,):
        if split in known:
            return split
    if wanted is not None:
        raise DataError(f"'{name}' has no split '{wanted}'; {did_you_mean(wanted, known)}")
    raise DataError(f"'{name}' has no split for {purpose}; name one as org/name:config:split out of {', '.join(known)}")


def _from_dataset(name: str, table: "datasets.Dataset", separator: str | None) -> Documents:
    if len(table) == 0:
        raise DataError(f"{name} is empty")
    column = documents.choose_column(name, table.column_names)
    values = table.with_format(None)[column]
    if separator is None and documents.COLUMNS[column] == "text":
        # Left on disk, as a data set may be larger than the memory; an arrow column has one type throughout.
        documents.from_values(name, column, list(values[:1]), None)
        return Documents(name, "text", values, False, "")
    return documents.from_values(name, column, list(values), separator)
