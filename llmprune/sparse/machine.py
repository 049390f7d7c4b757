"""What measures kernels, and what their timings depend on beside the weight: the device, its driver, the libraries."""

import hashlib
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import llmprune_kernels

_RUNS = 5  # of each candidate with each weight
_SHORTEST, _LONGEST = 0.15, 1.0  # seconds for one number of tokens
_CALLS = 20  # at least, between two looks at a GPU's clock

Candidates = Sequence[Callable[[int], Tensor]]


@dataclass(frozen=True)
class Machine:
    """A device by all that timings depend on, and what returns the seconds of candidates on it.

    `seconds` is given functions of the number of a weight, and how many weights there are.
    """

    name: str
    seconds: Callable[[Candidates, int], list[float]]


def machine_of(device: torch.device, graphs: bool = False) -> Machine:
    """Return the machine that a device is.

    Args:
        graphs: measure what a GPU needs for kernels that it was given as a whole (CUDA graphs, as made by
            `torch.compile(mode="reduce-overhead")`), without what it takes to start each of them.
    """
    if device.type == "cpu":
        name = f"{_processor()} threads={torch.get_num_threads()} torch={torch.__version__} kernels={_kernels()}"
        return Machine(name, _processor_seconds)
    name = (
        f"{torch.cuda.get_device_name(device)} driver={_driver()} torch={torch.__version__} "
        f"triton={_triton()} kernels={_kernels()}"
    )
    return Machine(name + " graphs" * graphs, lambda candidates, count: _gpu_seconds(candidates, count, device, graphs))


def _processor_seconds(candidates: Candidates, count: int) -> list[float]:
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


def _gpu_seconds(candidates: Candidates, count: int, device: torch.device, graphs: bool) -> list[float]:
    """Return the seconds of a call of each candidate, in the fastest of some rounds through all weights."""
    with torch.cuda.device(device):
        rounds = [_captured(candidate, count) if graphs else _round(candidate, count) for candidate in candidates]
        best = [float("inf")] * len(candidates)
        began, runs = time.perf_counter(), 0
        while not _enough(runs, 1, time.perf_counter() - began):
            for number, run in enumerate(rounds):
                best[number] = min(best[number], _elapsed(run) / _calls(count))
            runs += 1
    return best


def _calls(count: int) -> int:
    return -(-_CALLS // count) * count


def _round(candidate: Callable[[int], Tensor], count: int) -> Callable[[], None]:
    def run() -> None:
        for call in range(_calls(count)):
            candidate(call % count)

    run()  # compiles what has to be
    return run


def _captured(candidate: Callable[[int], Tensor], count: int) -> Callable[[], None]:
    """Return a round as one CUDA graph."""
    run = _round(candidate, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _elapsed(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _enough(runs: int, count: int, seconds: float) -> bool:
    """Say whether each weight had its turns, or fewer where one turn takes long."""
    return runs >= _RUNS and (seconds > _LONGEST or (runs >= _RUNS * count and seconds > _SHORTEST))


@cache
def _kernels() -> str:
    """Return a mark of the kernels' own code."""
    folder = Path(llmprune_kernels.__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]


@cache
def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text("utf-8").splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@cache
def _driver() -> str:
    """Return the version of the GPU's driver, where Linux tells it."""
    described = Path("/proc/driver/nvidia/version")
    text = described.read_text("utf-8") if described.is_file() else ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "unknown"


@cache
def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
