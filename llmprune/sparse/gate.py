"""Which implementation is fastest here: each is measured once per machine, the answer kept on disk.

Timings are those of the weights themselves, taken in turn, as a model reads them: what stays in the processor's cache
from one call to the next would flatter the larger candidate. Where the machine was busy at the time, delete `gate.json`
in the cache folder (`$XDG_CACHE_HOME/llmprune`, or `~/.cache/llmprune`) to measure anew.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.bitmask.layout import Tiles, multiply, multiply_expanded
from llmprune_kernels.native import cache_folder, sources

TOKENS = (1, 4, 16, 64, 256)
NEVER = 1 << 40
_RUNS = 5  # of each candidate with each weight
_SHORTEST, _LONGEST = 0.15, 1.0  # seconds for one number of tokens


@dataclass(frozen=True)
class Timing:
    """Seconds of one product with a weight, by implementation: dense, and sparse of two kinds."""

    tokens: int
    dense: float
    bitmask: float
    expand: float

    def sparse(self) -> float:
        """Return the seconds of the better sparse implementation."""
        return min(self.bitmask, self.expand)


@dataclass(frozen=True)
class Verdict:
    """What was measured for the weights of one shape, and what follows from it."""

    timings: tuple[Timing, ...]

    def expand_from(self) -> int:
        """Return the tokens from which on it pays to make the weight dense first."""
        return next((timing.tokens for timing in self.timings if timing.expand < timing.bitmask), NEVER)

    def slower_than_dense(self, tokens: int) -> bool:
        """Say whether sparse loses at the measured number of tokens nearest to `tokens`."""
        nearest = min(self.timings, key=lambda timing: abs(timing.tokens - tokens))
        return nearest.sparse() > nearest.dense


def judge(weights: Sequence[Tensor], packed: Sequence[Tiles], tokens: Sequence[int] = TOKENS) -> Verdict:
    """Measure the products with weights [O, I] of one shape, dense and in tiles, for each number of tokens."""
    share = sum(len(tiles.values) for tiles in packed) / sum(weight.numel() for weight in weights)
    shape = tuple(weights[0].shape)
    timings = []
    for count in sorted(set(tokens)):
        key = f"{_here()} {weights[0].dtype} {shape} {round(share * 20) / 20:.2f} {count}"
        known = _read().get(key)
        timing = Timing(**known) if known else _measure(weights, packed, count)
        if not known:
            _write(key, timing)
        timings.append(timing)
    return Verdict(tuple(timings))


def _measure(weights: Sequence[Tensor], packed: Sequence[Tiles], tokens: int) -> Timing:
    x_TI = torch.randn(tokens, weights[0].shape[1], generator=torch.Generator().manual_seed(0)).to(weights[0].dtype)
    candidates: list[Callable[[int], Tensor]] = [
        lambda index: functional.linear(x_TI, weights[index]),
        lambda index: multiply(x_TI, packed[index]).to(x_TI.dtype),
        lambda index: multiply_expanded(x_TI, packed[index]),
    ]
    return Timing(tokens, *_best_seconds(candidates, len(weights)))


def _best_seconds(candidates: Sequence[Callable[[int], Tensor]], count: int) -> list[float]:
    """Return the shortest run of each candidate; they take turns, and so do the `count` weights they are given."""
    best = [float("inf")] * len(candidates)
    began, runs = time.perf_counter(), 0
    while not _enough(runs, count, time.perf_counter() - began):
        for number, candidate in enumerate(candidates):
            start = time.perf_counter()
            candidate(runs % count)
            best[number] = min(best[number], time.perf_counter() - start)
        runs += 1
    return best


def _enough(runs: int, count: int, seconds: float) -> bool:
    """Say whether each weight had its turns, or fewer where one turn takes long."""
    return runs >= _RUNS and (seconds > _LONGEST or (runs >= _RUNS * count and seconds > _SHORTEST))


def _here() -> str:
    """Return what the timings depend on beside the weight: processor, threads, torch, kernels."""
    return f"{_processor()} threads={torch.get_num_threads()} torch={torch.__version__} kernels={_kernels()}"


@cache
def _kernels() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()[:8]


@cache
def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text("utf-8").splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _file() -> Path:
    return cache_folder() / "gate.json"


def _read() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_file().read_text("utf-8"))
        return found
    except (OSError, ValueError):
        return {}  # nothing measured yet, or a file cut short: measure again


def _write(key: str, timing: Timing) -> None:
    """Keep a timing for the next process; where the disk does not allow it, that one measures anew."""
    text = json.dumps(_read() | {key: vars(timing)}, indent=1)
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        partial = _file().with_suffix(f".{time.monotonic_ns()}")
        partial.write_text(text, "utf-8")
        partial.replace(_file())
    except OSError:
        return
