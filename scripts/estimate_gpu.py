"""Foretell what pruning a model of Llama-2-7B's shape takes on a GPU, on a machine without one.

    python scripts/estimate_gpu.py                                # fast and balanced, 50 % and 2:4, 128 x 2048 tokens
    python scripts/estimate_gpu.py --preset fast --pattern 2:4

One block, and then two, are pruned by `llmprune.prune` on a GPU that has no values (tests/pretended_gpu.py), which notes
each operation, its bytes and its products. From that a roofline: an operation takes the longest of the time to move its
bytes, to multiply, and to be started, and the host waits for some answers. Prints one JSON row for each phase, with what
the second block adds and how long all blocks take, and one for the whole run. Work of the host and files are left out.
What is taken for granted is in `RATES` and below; nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import llmprune
from bench_gpu import SEVEN_B, link_model, outer_shapes, write_tokens
from bench_memory import Llama, block_shapes
from llmprune.patterns import Count
from llmprune.report import Clock
from pretended_gpu import Done, PretendedGpu, pretended_gpu

# An H200: products a second at what large ones reach of the peak, bytes a second, seconds.
RATES = {"16 bit": 650e12, "tf32": 330e12, "fp32": 45e12, "solver": 30e12}
BYTES = 4.0e12
START = 6e-6  # of an operation, by the host
LEAST = 3e-6  # of an operation, on the GPU
WAIT = 30e-6  # for an answer
PINNED, PAGEABLE = 40e9, 5e9  # bytes a second, to the GPU and back


def write_holes(folder: Path, model: Llama) -> None:
    """Write a checkpoint of zeros that takes no room."""
    folder.mkdir()
    parts = {"outer": outer_shapes(model)} | {str(block): block_shapes(model, block) for block in range(model.blocks)}
    for part, shapes in parts.items():
        header: dict[str, Any] = {}
        end = 0
        for name, shape in shapes:
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / f"{part}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)


@contextmanager
def phases_told(gpu: PretendedGpu) -> Iterator[None]:
    """Let the GPU know the phases of the run."""
    phase = Clock.phase

    @contextmanager
    def told(clock: Clock, name: str) -> Iterator[None]:
        before, gpu.phase = gpu.phase, name
        try:
            with phase(clock, name):
                yield
        finally:
            gpu.phase = before

    with mock.patch.object(Clock, "phase", told), mock.patch.object(Count, "check", lambda *_: None):
        yield


def seconds(done: Done) -> dict[str, float]:
    """Return what a phase takes: on the GPU, to be started, for answers, and on the bus."""
    busy = 0.0
    for name, calls in done.calls.items():
        products = sum(count / RATES[how] for (what, how), count in done.products.items() if what == name)
        busy += max(done.moved[name] / BYTES, products, calls * LEAST)
    bus = done.pageable / PAGEABLE + (done.to_gpu + done.to_host - done.pageable) / PINNED
    started, waited = done.total * START, done.waits.total() * WAIT
    return {"gpu": busy, "start": started, "wait": waited, "bus": bus, "in all": max(busy, started) + waited + bus}


def phases(preset: str, pattern: str, blocks: int, sequences: int, length: int) -> dict[str, Done]:
    """Return what pruning so many blocks gives a GPU to do, by phase."""
    model = replace(SEVEN_B, blocks=blocks)
    with tempfile.TemporaryDirectory() as folder, pretended_gpu("meta") as gpu, phases_told(gpu):
        work = Path(folder)
        write_holes(work / "shards", model)
        tokens = str(write_tokens(work / "tokens.jsonl", sequences, length))
        checkpoint = link_model(work / "shards", work / "model", model)
        llmprune.prune(checkpoint, work / "out", preset=preset, pattern=pattern, calibration=tokens, device="cuda")
    return dict(gpu.by_phase)


def rows(preset: str, pattern: str, sequences: int, length: int, operations: bool) -> Iterator[dict[str, Any]]:
    """Yield what each phase takes, and all of them."""
    one, two = (phases(preset, pattern, blocks, sequences, length) for blocks in (1, 2))
    whole = 0.0
    for phase, done in two.items():
        first, both = seconds(one[phase]), seconds(done)
        more = {name: both[name] - first[name] for name in both}
        blocks = first["in all"] + (SEVEN_B.blocks - 1) * more["in all"]
        row: dict[str, Any] = {"preset": preset, "pattern": pattern, "phase": phase or "between phases"}
        row |= {"operations a block": done.total - one[phase].total}
        row |= {f"{name}, a block": round(value, 4) for name, value in more.items()} | {"all blocks": round(blocks, 2)}
        if operations:
            row["by operation"] = {name: [calls, done.moved[name]] for name, calls in done.calls.most_common()}
            row["products"] = {f"{name} {how}": count for (name, how), count in done.products.items()}
            row["waits"] = dict(done.waits)
        yield row
        whole += blocks
    yield {"preset": preset, "pattern": pattern, "whole run": round(whole, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append")
    parser.add_argument("--pattern", action="append")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--operations", action="store_true", help="also print the operations of each phase")
    arguments = parser.parse_args()
    for preset in arguments.preset or ("fast", "balanced"):
        for pattern in arguments.pattern or ("50%", "2:4"):
            for row in rows(preset, pattern, arguments.sequences, arguments.length, arguments.operations):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
