"""Measure sparse against dense on the CPU: single matrices whose weights come from memory, and a whole model.

    python scripts/bench_sparse.py > rows.jsonl

Prints one JSON row a line, for 1 thread and for `--threads`:

    product   one weight, `tokens` rows of input: seconds (median, p20, p80) of torch's bfloat16 linear and of the
              sparse one; as many copies take turns as exceed the cache
    model     a random Llama of about 0.7 B parameters at 50 %: what `llmprune bench` reports
    files     the same model on disk: bytes compressed and dense, seconds to load either

Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmprune.checkpoint.compressed import compress
from llmprune.checkpoint.unpacked import open_dense
from llmprune.patterns import parse
from llmprune.report import hardware, versions
from llmprune.sparse.bench import measure
from llmprune.sparse.running import load
from llmprune_kernels.bitmask.layout import Tiles
from llmprune_kernels.bitmask.ops import bitmask_linear

SHAPES = ((4096, 4096), (11008, 4096))
PATTERNS = ("50%", "70%", "2:4")
TOKENS = (1, 8, 64, 512)
COPIES_BYTES = 192 << 20
LLAMA: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 14, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 16384, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


def pruned(shape: tuple[int, int], pattern: str) -> Tensor:
    """Return a random bfloat16 weight [O, I] that the pattern was applied to by magnitude."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    kept: Tensor = weight.masked_fill_(~parse(pattern).keep(weight.abs()), 0).bfloat16()
    return kept


def product_rows(threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape, pattern and number of tokens."""
    for shape in SHAPES:
        copies = max(2, COPIES_BYTES // (2 * shape[0] * shape[1]))
        for pattern in PATTERNS:
            weight = pruned(shape, pattern)
            dense = [weight.roll(8 * number, 0) for number in range(copies)]
            packed = [Tiles.pack(weight) for weight in dense]
            share = packed[0].nbytes() / dense[0].nbytes
            for tokens in TOKENS if pattern == "50%" else TOKENS[:1]:
                x_TI = torch.randn(tokens, shape[1]).bfloat16()
                seconds = in_turn(candidates(x_TI, dense, packed), copies, rounds if tokens < 64 else 3)
                yield {
                    "row": "product", "threads": threads, "shape": shape, "pattern": pattern, "tokens": tokens,
                    "bytes_of_dense": share, **seconds,
                }  # fmt: skip


def candidates(x_TI: Tensor, dense: list[Tensor], packed: list[Tiles]) -> dict[str, Callable[[int], Tensor]]:
    """Return the implementations that are compared, as functions of the copy's number."""

    def sparse(index: int, expand_from: int) -> Tensor:
        tiles = packed[index]
        y_TO: Tensor = bitmask_linear(x_TI, tiles.masks, tiles.values, tiles.offsets, tiles.outputs, None, expand_from)
        return y_TO

    return {
        "dense": lambda index: functional.linear(x_TI, dense[index]),
        "bitmask": lambda index: sparse(index, len(x_TI) + 1),
        "expand": lambda index: sparse(index, 0),
    }


def in_turn(functions: dict[str, Callable[[int], Tensor]], copies: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of each function, run in turn on one copy after the other, and their speed over dense."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(copies * rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function(number % copies)
            taken[name].append(time.perf_counter() - began)
    seconds = {name: np.array(values[1:]) for name, values in taken.items()}
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "seconds": {
            name: [float(value) for value in np.percentile(all_, (50, 20, 80))] for name, all_ in seconds.items()
        },
        "fastest": {name: float(all_.min()) for name, all_ in seconds.items()},
        "speedup_median": {name: medians["dense"] / median for name, median in medians.items()},
        "speedup_fastest": {name: float(seconds["dense"].min() / all_.min()) for name, all_ in seconds.items()},
    }


def random_llama() -> Any:
    """Return a random bfloat16 Llama whose blocks are pruned to 50 %."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA, dtype=torch.bfloat16))
    model.to(torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = layer.weight.data
            weight.masked_fill_(~parse("50%").keep(weight.abs().float()), 0)
    return model.eval()


def model_row(model: Any, threads: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return what `llmprune bench` says of the model, for prompts of 512 tokens in all."""
    setting = {"prompt_tokens": 512 // batch, "new_tokens": 16, "batch": batch, "rounds": rounds}
    return {"row": "model", "threads": threads, **measure(model, "random Llama 0.7 B, 50 %", setting).to_json()}


def file_row(model: Any, threads: int) -> dict[str, Any]:
    """Return the model's sizes on disk and the seconds that it takes to load."""
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense", Path(folder) / "small"
        model.save_pretrained(dense)
        sizes = compress(dense, small).to_json()
        seconds: dict[str, list[float]] = {"dense": [], "small": []}
        for _ in range(3):
            for name, path in (("dense", dense), ("small", small)):
                began = time.perf_counter()
                load(open_dense(path))
                seconds[name].append(time.perf_counter() - began)
    return {"row": "files", "threads": threads, **sizes, "load_seconds": seconds}


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="measured beside 1 thread [default: 2]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("product", "model", "files"))
    asked = parser.parse_args()
    print(json.dumps({"row": "where", **hardware(), "versions": versions()}), flush=True)
    for row in rows(asked.only, sorted({1, asked.threads}), asked.rounds):
        print(json.dumps(row), flush=True)
        print(row["row"], row["threads"], file=sys.stderr)


def rows(only: str | None, threads: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows that were asked for."""
    if only in (None, "product"):
        for count in threads:
            torch.set_num_threads(count)
            yield from product_rows(count, rounds)
    if only == "product":
        return
    model = random_llama()
    for count in threads:
        torch.set_num_threads(count)
        if only != "files":
            yield from (model_row(model, count, batch, rounds) for batch in (1, 8))
    if only != "model":
        yield file_row(model, torch.get_num_threads())


if __name__ == "__main__":
    main()
