"""Measure sparse against dense on a GPU: single matrices, and a random model of 7 B parameters that decodes.

    python scripts/bench_gpu_sparse.py > rows.jsonl

Prints one JSON row a line:

    where     the GPU, its driver, versions, and the bytes a second at which it copies memory
    product   one weight, `tokens` rows of input, one kernel: seconds (median, p20, p80) a call and what follows from
              them; as many copies take turns as exceed the cache. Mode `graph` is what the GPU needs by itself, `eager`
              includes what it takes to start the kernel from Python, where that is longer
    decode    one step of the model after a prompt, dense and as `llmprune.sparsify` makes it, and what that chose

A kernel that fails has a row with `failed`, and the exit status is 1. Progress goes to stderr. `--tiny` takes sizes that
a CPU is done with in seconds; there the kernels' readable references run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.environment import hardware, versions
from llmprune.patterns import parse
from llmprune.sparse.bench import linear_bytes, twin
from llmprune.sparse.forms import CuSparseLt, Form, Fragments, Pairs, Rows, is_two_four
from llmprune.sparse.machine import machine_of
from llmprune.sparse.sparsify import sparsify
from llmprune_kernels.support import cusparselt_missing, sparse_cores_missing, triton_missing

PATTERNS = ("2:4", "50%", "60%", "70%")
SHAPES = ((4096, 4096), (11008, 4096), (14336, 4096), (28672, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 2048)
TINY_SHAPES, TINY_TOKENS = ((64, 128),), (3, 128)
FEW = 64  # tokens: kernels that read weights once for each few tokens are not for more
COPIES_BYTES = 256 << 20  # of dense weights: several times a GPU's cache
LLAMA: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
TINY_LLAMA = LLAMA | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
Row = dict[str, Any]
Job = tuple[str, int, Callable[[int], Tensor]]  # a kernel's name, the bytes it reads, its product with a copy


class Stopwatch:
    """Measures calls on a device: each round is some calls, and one look at the clock."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def seconds(self, call: Callable[[int], object], copies: int, graph: bool) -> list[float]:
        """Return the median, p20 and p80 of the seconds of a call; calls take the copies in turn."""
        calls = -(-20 // copies) * copies if self.device.type == "cuda" else copies

        def run() -> None:
            for number in range(calls):
                call(number % copies)

        run()
        run = self._captured(run) if graph else run
        taken = self._on_gpu(run) if self.device.type == "cuda" else self._on_cpu(run)
        return [float(value) / calls for value in np.percentile(taken, (50, 20, 80))]

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _on_gpu(self, run: Callable[[], None]) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.rounds + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]

    def _on_cpu(self, run: Callable[[], None]) -> list[float]:
        taken = []
        for _ in range(self.rounds):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        return taken


def pruned(weight_OI: Tensor, pattern: str) -> Tensor:
    """Return a weight that the pattern was applied to by magnitude, in place, some rows at a time."""
    for rows_OI in weight_OI.split(1024):
        rows_OI.masked_fill_(~parse(pattern).keep(rows_OI.abs().float()), 0)
    return weight_OI


def forms_of(weight_OI: Tensor, device: torch.device) -> list[type[Form]]:
    """Return all forms whose kernels can run for a weight; on a CPU those with a reference."""
    if not is_two_four(weight_OI):
        return [Rows] if device.type == "cpu" or triton_missing() is None else []
    found: list[type[Form]] = []
    if device.type == "cpu" or sparse_cores_missing(device) is None:
        found.append(Fragments)
    if triton_missing() is None:
        found.append(Pairs)
    if cusparselt_missing(device) is None:
        found.append(CuSparseLt)
    return found


def product_rows(
    shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...], watch: Stopwatch, bandwidth: float
) -> Iterator[Row]:
    """Yield a row for each shape, pattern, number of tokens, kernel and mode."""
    for shape in shapes:
        for pattern in PATTERNS:
            torch.manual_seed(0)
            weight_OI = pruned((torch.randn(shape, device=watch.device) * 0.02).bfloat16(), pattern)
            copies = max(1, (COPIES_BYTES if watch.device.type == "cuda" else 1) // weight_OI.nbytes)
            many = []
            for kind in forms_of(weight_OI, watch.device):
                try:
                    form = kind.of(weight_OI)
                except Exception as error:  # one form that fails here must not hide what the others do
                    yield {
                        "row": "pack",
                        "shape": shape,
                        "pattern": pattern,
                        "form": kind.__name__,
                        "failed": said(error),
                    }
                    continue
                many.append([form.moved(torch.clone) for _ in range(copies)])
            dense = [weight_OI.clone() for _ in range(copies)]
            exact_OI = weight_OI.double()
            for tokens in counts:
                x_TI = torch.randn(tokens, shape[1], device=watch.device).bfloat16()
                known = {"row": "product", "shape": shape, "pattern": pattern, "tokens": tokens}
                expected_TO = x_TI.double() @ exact_OI.T
                yield from kernel_rows(known, x_TI, expected_TO, dense, many, watch, bandwidth)


def kernel_rows(
    known: Row, x_TI: Tensor, expected_TO: Tensor, dense: list[Tensor], many: list[list[Form]], watch: Stopwatch,
    bandwidth: float,
) -> Iterator[Row]:  # fmt: skip
    """Yield the rows of all kernels for one input; the first is dense, and the others are compared with it."""
    jobs: list[Job] = [("dense", dense[0].nbytes, lambda index: functional.linear(x_TI, dense[index]))]
    for forms in many:
        for kernel in forms[0].kernels:
            if len(x_TI) <= FEW or kernel in ("expand", "cusparselt"):
                jobs += products(x_TI, forms, kernel)
    modes = ("eager", "graph") if watch.device.type == "cuda" else ("eager",)
    baseline: dict[str, float] = {}
    for kernel, nbytes, call in jobs:
        for mode in modes:
            row = known | {"kernel": kernel, "mode": mode}
            try:
                found_TO = call(0)
                seconds = watch.seconds(call, len(dense), mode == "graph")
            except Exception as error:  # nor must one kernel
                yield row | {"failed": said(error)}
                continue
            baseline.setdefault(mode, seconds[0])
            yield row | {
                "seconds": seconds, "speedup": baseline[mode] / seconds[0], "bytes": nbytes,
                "roofline": nbytes / bandwidth / seconds[0],
                "error": float((found_TO.double() - expected_TO).abs().max() / expected_TO.abs().max()),
            }  # fmt: skip


def said(error: Exception) -> str:
    """Return an error as one short text."""
    return f"{type(error).__name__}: {error}"[:300]


def products(x_TI: Tensor, forms: list[Form], kernel: str) -> list[Job]:
    """Return what is to be measured of a kernel; of cuSPARSELt its default algorithm and the one that it finds."""

    def job(name: str, setting: Callable[[], int]) -> Job:
        return name, forms[0].nbytes(), lambda index: forms[index].linear(x_TI, kernel, setting(), None)

    if kernel != "cusparselt":
        return [job(kernel, lambda: 0)]
    searched = functools.cache(lambda: forms[0].search(x_TI, kernel))
    return [job("cusparselt default", lambda: 0), job("cusparselt searched", searched)]


def random_llama(fields: Row, pattern: str, device: torch.device) -> Any:
    """Return a random bfloat16 Llama on the device, all linear layers in its blocks pruned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = LlamaForCausalLM(LlamaConfig(**fields))
    finally:
        torch.set_default_dtype(before)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            pruned(layer.weight.data, pattern)
    return model.eval().requires_grad_(False)


def decode_rows(fields: Row, batches: tuple[int, ...], watch: Stopwatch, bandwidth: float) -> Iterator[Row]:
    """Yield a row for each pattern, batch, side and mode."""
    for pattern in ("2:4", "50%"):
        dense = random_llama(fields, pattern, watch.device)
        for batch in batches:
            for mode in ("eager", "graph") if watch.device.type == "cuda" else ("eager",):
                sparse = twin(dense)
                choices = str(sparsify(sparse, batch=batch, graphs=mode == "graph"))
                for side, model in (("dense", dense), ("sparse", sparse)):
                    row = {"row": "decode", "pattern": pattern, "batch": batch, "mode": mode, "side": side}
                    yield row | decoded(model, batch, mode == "graph", watch, bandwidth) | {"choices": choices}
                del sparse


@torch.inference_mode()
def decoded(model: Any, batch: int, graph: bool, watch: Stopwatch, bandwidth: float) -> Row:
    """Return the speed of a step after 128 tokens, in tokens a second, and its share of what memory allows."""
    prompt_BT = torch.randint(0, model.config.vocab_size, (batch, 128), device=watch.device)
    try:
        out = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
        ids_B1 = out.logits[:, -1:].argmax(-1)

        def step(_: int) -> object:  # the cache is copied, as a step appends to it: the same step, again and again
            return model(input_ids=ids_B1, past_key_values=copy.deepcopy(out.past_key_values), use_cache=True)

        seconds = watch.seconds(step, 1, graph)
    except Exception as error:  # nor must one way to run a model
        return {"failed": said(error)}
    nbytes = linear_bytes(model)
    return {
        "seconds": seconds, "tokens_per_s": batch / seconds[0], "linear_bytes": nbytes,
        "roofline": nbytes / bandwidth / seconds[0],
    }  # fmt: skip


def copy_bandwidth(device: torch.device, tiny: bool) -> float:
    """Return the bytes a second that a copy reads and writes."""
    source = torch.empty((1 << 20) if tiny else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    median, *_ = Stopwatch(device, 5).seconds(lambda _: target.copy_(source), 1, False)
    return 2 * source.nbytes / median


def where(device: torch.device, bandwidth: float) -> Row:
    """Return what the rows were measured on."""
    return {
        "row": "where", **hardware(), "device": machine_of(device).name, "versions": versions(),
        "cuda": torch.version.cuda, "bandwidth_bytes_per_s": bandwidth,
        "missing": {"sparse cores": sparse_cores_missing(device), "cuSPARSELt": cusparselt_missing(device)},
    }  # fmt: skip


def main() -> int:
    """Print the rows; return 1 if a kernel failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on the CPU where there is no GPU")
    parser.add_argument("--only", choices=("product", "decode"))
    parser.add_argument("--rounds", type=int, default=10)
    asked = parser.parse_args()
    if not (asked.tiny or torch.cuda.is_available()):
        print("no CUDA GPU: only --tiny runs on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch = Stopwatch(device, 2 if asked.tiny else asked.rounds)
    bandwidth = copy_bandwidth(device, asked.tiny)
    print(json.dumps(where(device, bandwidth)), flush=True)
    failures = 0
    for row in rows(asked.only, asked.tiny, watch, bandwidth):
        failures += "failed" in row
        print(json.dumps(row), flush=True)
        print(*(row[name] for name in row if name not in ("seconds", "choices")), file=sys.stderr)
    return int(failures > 0)


def rows(only: str | None, tiny: bool, watch: Stopwatch, bandwidth: float) -> Iterator[Row]:
    """Yield the rows that were asked for."""
    if only != "decode":
        shapes, counts = (TINY_SHAPES, TINY_TOKENS) if tiny else (SHAPES, TOKENS)
        with torch.inference_mode():
            yield from product_rows(shapes, counts, watch, bandwidth)
    if only != "product":
        yield from decode_rows(TINY_LLAMA if tiny else LLAMA, (2,) if tiny else (1, 8), watch, bandwidth)


if __name__ == "__main__":
    sys.exit(main())
