"""Time pruning a model of the shape of Llama-2-7B on a GPU, phase by phase, with every preset.

    python scripts/bench_gpu.py                              # all presets, 128 x 2048 random tokens, within 7 minutes
    python scripts/bench_gpu.py --preset fast --pattern 2:4
    python scripts/bench_gpu.py --layers 4                   # of fewer blocks; rows say so
    python scripts/bench_gpu.py --tiny                       # a toy, on the CPU in seconds

Writes a randomly initialised checkpoint in bfloat16, one file a block, and prunes it with `llmprune.prune` as any other.
Checkpoint and output lie in host memory (/dev/shm) where there is room for both, so that no disk is read; `--work` puts
them elsewhere. Needs no network. Prints one JSON row for each preset and pattern:

    wall_s            the whole call, from opening the checkpoint to the finished output folder
    without_reading_s the same without load_s and copy_s
    load_s, copy_s    reading the blocks into the GPU; copying the source's files, over which pruned tensors are written
    calibration_s     forwards of the blocks, without Grams; a dense target doubles them
    grams_s           sums of products of the inputs, by the GPU's own clock
    solve_s, write_s  masks and weights; the pruned tensors' way into the output
    allocation_s      of presets that share out a sparsity; with it the only reading of blocks that then stay on the GPU
    other_s           what remains: building the model, reading tokens, checks
    peak_gpu_bytes    the most memory that tensors took on the GPU; peak_host_bytes: of the process
    blocks_run        of `blocks`; where fewer were run, whole_model_s is wall_s times blocks / blocks_run, an estimate

Before each run, one block is pruned with two sequences (which compiles the kernels) and once more with all. If the time
that is left (`--budget`) is not enough for all blocks by that measure, fewer are run; if for none, the row says
`not_run`. A run that outlasts the budget is ended, and its row says `stopped`; one that fails, for want of memory say,
says why as `failed`, and the next one is begun. Progress, and where a run failed, goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import llmprune
from bench_memory import INDEX, INIT_STD, Llama, block_shapes
from bench_peers import Row, machine, say
from llmprune.environment import hardware, peak_memory, versions
from llmprune.errors import one_line
from llmprune.presets import PRESETS
from llmprune.statistics import CrossGram, Gram

VOCABULARY = 32000
SEED = 0
SPARE = 1.1  # room on a file system for this much more than the checkpoint and its output
PHASES = {"load": "load", "copy": "copy", "solve": "solve", "write": "write"}
SEVEN_B = Llama(hidden=4096, intermediate=11008, heads=32, blocks=32)
TINY = Llama(hidden=64, intermediate=176, heads=4, blocks=2)


@dataclass(frozen=True)
class Task:
    """What one run prunes, with what."""

    checkpoint: Path
    tokens: Path
    out: Path
    preset: str
    pattern: str
    device: str


def outer_shapes(model: Llama) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors outside the decoder blocks."""
    yield "model.embed_tokens.weight", (VOCABULARY, model.hidden)
    yield "model.norm.weight", (model.hidden,)
    yield "lm_head.weight", (VOCABULARY, model.hidden)


def write_shards(folder: Path, model: Llama, device: str) -> None:
    """Write every block, and what surrounds them, to a file of its own."""
    generator = torch.Generator(device).manual_seed(SEED)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (drawn * INIT_STD).to(torch.bfloat16).cpu()

    folder.mkdir(parents=True)
    parts = {"outer": outer_shapes(model)} | {str(block): block_shapes(model, block) for block in range(model.blocks)}
    for name, shapes in parts.items():
        save_file({key: tensor(shape) for key, shape in shapes}, folder / f"{name}.safetensors", {"format": "pt"})


def link_model(shards: Path, folder: Path, model: Llama) -> Path:
    """Make a checkpoint of the first blocks, its files shared with `shards`."""
    if folder.exists():
        return folder
    folder.mkdir()
    model.config().save_pretrained(folder)
    places = {key: "outer" for key, _ in outer_shapes(model)}
    for block in range(model.blocks):
        places |= {key: str(block) for key, _ in block_shapes(model, block)}
    for name in dict.fromkeys(places.values()):
        os.link(shards / f"{name}.safetensors", folder / f"{name}.safetensors")
    index = {"metadata": {}, "weight_map": {key: f"{name}.safetensors" for key, name in places.items()}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def write_tokens(path: Path, sequences: int, length: int) -> Path:
    """Write rows of random token ids."""
    ids = torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(SEED))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    return path


class Stopwatch:
    """Adds up the time that calls take where they are executed: on a GPU between two of its own events."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []
        self._inside = False

    def watched(self, function: Callable[..., None]) -> Callable[..., None]:
        """Return the function with its calls timed; those that it makes itself count once."""

        def call(*args: Any, **kwargs: Any) -> None:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            try:
                begin = _mark()
                function(*args, **kwargs)
                self._spans.append((begin, _mark()))
            finally:
                self._inside = False  # a run goes on with less where memory runs out

        return call

    def seconds(self) -> float:
        if not torch.cuda.is_available():
            return float(sum(end - begin for begin, end in self._spans))
        torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1000


def _mark() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def grams_watched() -> Iterator[Stopwatch]:
    """Time all sums of Gram matrices inside the block."""
    watch, before = Stopwatch(), (Gram.add, CrossGram.add)
    Gram.add, CrossGram.add = watch.watched(before[0]), watch.watched(before[1])  # type: ignore[method-assign]
    try:
        yield watch
    finally:
        Gram.add, CrossGram.add = before  # type: ignore[method-assign]


class OutOfTime(BaseException):
    """The budget is used up; no plain exception, as code that tries something and goes on would take it for a failure."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block where it takes longer."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    # Again every second: Python drops what is raised while it collects garbage or ends an object.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prune(task: Task) -> Row:
    """Prune once, as a process that has just begun would, and return the times of the phases."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with grams_watched() as watch:
        report = llmprune.prune(
            task.checkpoint,
            task.out,
            preset=task.preset,
            pattern=task.pattern,
            calibration=str(task.tokens),
            seed=SEED,
            device=task.device,
            overwrite=True,
        )
    wall, grams = time.perf_counter() - begin, watch.seconds()
    shutil.rmtree(task.out)
    seconds = dict(report.clock.seconds)
    named = {f"{name}_s": seconds.pop(phase, 0.0) for phase, name in PHASES.items()}
    forwards = sum(seconds.pop(phase, 0.0) for phase in ("statistics", "forward"))
    row = {
        "wall_s": wall,
        "without_reading_s": wall - named["load_s"] - named["copy_s"],
        **named,
        "calibration_s": forwards - grams,
        "grams_s": grams,
        **{f"{phase}_s": took for phase, took in seconds.items()},  # phases that only some presets have
    }
    row["other_s"] = wall - sum(took for name, took in row.items() if name not in ("wall_s", "without_reading_s"))
    peak = peak_memory()
    return {name: round(took, 6) for name, took in row.items()} | {
        "peak_gpu_bytes": peak["device"],
        "peak_host_bytes": peak["host"],
        "sparsity": round(report.zeros / report.site_parameters, 6),
        "most_runs": report.most_runs,
        "retries": report.retries,
    }


@dataclass(frozen=True)
class Bench:
    """All runs: of so many blocks at most, until `end` by the clock of `time.perf_counter`."""

    work: Path
    model: Llama
    most: int
    few: Path  # the tokens of two sequences
    tokens: Path
    device: str
    end: float

    def row(self, preset: str, pattern: str) -> Row:
        """Return what a preset takes, or why that is not known."""
        task = Task(self._checkpoint(1), self.tokens, self.work / "pruned", preset, pattern, self.device)
        row: Row = {"preset": preset, "pattern": pattern, "blocks": self.model.blocks, "blocks_run": 0}
        if self._left() <= 0:
            return row | {"not_run": "the budget is used up"}
        try:
            with at_most(self._left()):
                return row | self._measured(task)
        except OutOfTime:
            return row | {"stopped": "the budget was used up before it was done"}
        except Exception as error:  # whatever torch, Triton or a driver raises: the next preset is still to be measured
            traceback.print_exc()
            return row | {"failed": f"{type(error).__name__}: {one_line(str(error))}"[:500]}

    def _measured(self, task: Task) -> Row:
        prune(replace(task, tokens=self.few))
        a_block = prune(task)["wall_s"]
        blocks = max(0, min(self.most, int(self._left() / a_block)))
        left = f"{max(self._left(), 0):.0f} s are left"
        say(f"{task.preset} {task.pattern}: one block takes {a_block:.1f} s, {left}, running {blocks} blocks")
        if not blocks:
            return {"not_run": f"a block takes {a_block:.1f} s, {left}"}
        took = prune(replace(task, checkpoint=self._checkpoint(blocks)))
        whole = round(took["wall_s"] * self.model.blocks / blocks, 3)
        fewer = blocks < self.model.blocks
        return {"blocks_run": blocks, **took, "whole_model_s": whole, "extrapolated": fewer}

    def _left(self) -> float:
        return self.end - time.perf_counter()

    def _checkpoint(self, blocks: int) -> Path:
        return link_model(self.work / "shards", self.work / f"model-{blocks}", replace(self.model, blocks=blocks))


def bench(arguments: argparse.Namespace, work: Path, model: Llama, most: int) -> Iterator[Row]:
    """Yield a row for every preset and pattern, as far as the time goes."""
    began = time.perf_counter()
    write_shards(work / "shards", replace(model, blocks=most), arguments.device)
    say(f"wrote {most} blocks in {time.perf_counter() - began:.1f} s")
    tokens = write_tokens(work / "tokens.jsonl", arguments.sequences, arguments.length)
    few = write_tokens(work / "few.jsonl", min(2, arguments.sequences), arguments.length)
    runs = Bench(work, model, most, few, tokens, arguments.device, began + arguments.budget)
    for preset in arguments.preset or PRESETS:
        for pattern in arguments.pattern or ["50%"]:
            yield runs.row(preset, pattern)


def work_folder(model: Llama) -> Path:
    """Return a folder in host memory, or else on the disk, with room for checkpoint and output."""
    shapes = [shape for block in range(model.blocks) for _, shape in block_shapes(model, block)]
    numbers = sum(torch.Size(shape).numel() for shape in [*shapes, *(shape for _, shape in outer_shapes(model))])
    memory, disk, needed = Path("/dev/shm"), Path(tempfile.gettempdir()), SPARE * 2 * 2 * numbers
    for place in (memory, disk):
        if place.is_dir() and shutil.disk_usage(place).free > needed:
            return place
    raise SystemExit(f"{needed / 1e9:.0f} GB are needed in {memory} or {disk}: name another place with --work")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=list(PRESETS), help="repeatable; default all")
    parser.add_argument("--pattern", action="append", help="repeatable; default 50%%")
    parser.add_argument("--layers", type=int, metavar="N", help="run this many blocks at most")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="for everything (default 420)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where checkpoint and output lie, for as long as needed"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU, to see that everything works")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.device = "cpu"
    arguments.sequences = arguments.sequences or (4 if arguments.tiny else 128)
    arguments.length = arguments.length or (32 if arguments.tiny else 2048)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --tiny runs a toy on the CPU")
    return arguments


def main() -> None:
    arguments = parse()
    model = TINY if arguments.tiny else SEVEN_B
    most = min(arguments.layers or model.blocks, model.blocks)
    base = arguments.work or work_folder(replace(model, blocks=most))
    where = {
        "model": "toy" if arguments.tiny else "Llama-2-7B's shape, random, bfloat16",
        "sequences": arguments.sequences,
        "length": arguments.length,
        "source": "host memory" if base == Path("/dev/shm") else "disk",
        "versions": versions() | {"torch_build": torch.__version__, "cuda": torch.version.cuda},
        "hardware": hardware() | machine(),
    }
    with tempfile.TemporaryDirectory(dir=base, prefix="bench_gpu_") as folder:
        for row in bench(arguments, Path(folder), model, most):
            print(json.dumps(row | where), flush=True)


if __name__ == "__main__":
    main()
