"""`llmprune.json` as it is read.

It may have been edited, cut off, or written by anybody, so what its readers rely on is checked here, and nowhere else.
"""

import json
from pathlib import Path
from typing import Any, TypedDict

from llmprune.checkpoint.guard import MAX_JSON_BYTES, require_inside, require_modest
from llmprune.errors import CheckpointError
from llmprune.structure import fault_in


class _ChosenOptions(TypedDict, total=False):
    sparsities: dict[str, Any]
    overrides: dict[str, Any]
    revision: str | None


class _Recipe(_ChosenOptions):
    method: str
    pattern: str | float
    method_options: dict[str, Any]


class _Calibration(TypedDict):
    data: str
    fingerprint: str
    note: str


class _Shares(TypedDict):
    sites: float
    all_parameters: float


class _Counts(TypedDict):
    all: int
    blocks: int


class _Coverage(TypedDict):
    inner_parameters: float


class _Site(TypedDict):
    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    sparsity: float
    error: float
    error_norm: str
    tokens: int
    notes: list[str]
    magnitude_error: float | None


class _Tuning(TypedDict):
    block: str
    before: float
    after: float
    epochs: int
    rate: float
    vectors: list[str]


class _Bytes(TypedDict):
    host: int
    device: int


class _Hardware(TypedDict):
    machine: str
    threads: int
    gpu: str | None


class _Distance(TypedDict, total=False):
    dense_perplexity: float | None
    kl_divergence: float | None
    top1_agreement: float | None


class _Evaluation(_Distance):
    data: str
    perplexity: float
    length: int
    dtype: str
    convention: str


class _Median(TypedDict):
    median: float


class _Speeds(TypedDict):
    decode: _Median


class _Device(TypedDict, total=False):
    device: str


class _Speed(_Device):
    dense: _Speeds
    sparse: _Speeds | None
    batch: int
    hardware: _Hardware


class _Size(TypedDict):
    dense_bytes: int
    compressed_bytes: int


class _Added(TypedDict, total=False):
    """What is not there from the beginning."""

    companions: list[str]
    evaluations: list[_Evaluation]
    speed: _Speed
    size: _Size


class RunFile(_Added):
    """What `llmprune.report.Report.to_json` writes, as far as anything reads it."""

    model: str
    recipe: _Recipe
    calibration: _Calibration | None
    sparsity: _Shares
    parameters: _Counts
    coverage: _Coverage
    sites: list[_Site]
    tuning: list[_Tuning]
    left_dense: dict[str, str]
    notes: list[str]
    timings: dict[str, float]
    peak_memory_bytes: _Bytes
    memory_bytes: dict[str, _Bytes]
    one_pass: list[str] | None
    versions: dict[str, str]
    hardware: _Hardware


def read_run_file(path: Path, way_out: str) -> dict[str, Any]:
    """Return what a `llmprune.json` holds, a `RunFile` in plain values.

    Args:
        path: of the file, which is there.
        way_out: what the user can do about a damaged one.

    Raises:
        CheckpointError: it is damaged, a link out of its folder, or larger than any honest one.
    """
    text = require_modest(require_inside(path.parent, path), MAX_JSON_BYTES).read_bytes()
    try:
        run: dict[str, Any] = json.loads(text)
        json.dumps(run, ensure_ascii=False, allow_nan=False).encode()  # it can be written again
        fault = fault_in(run, RunFile)
    except (ValueError, RecursionError) as error:
        fault = f"it is no JSON in UTF-8 ({error})"
    if fault is not None:
        raise CheckpointError(f"{path} is damaged: {fault}; {way_out}")
    return run
