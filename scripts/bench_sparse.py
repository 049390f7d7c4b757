"""Measure sparse against dense on the CPU: single matrices whose weights come from memory, and a whole model.

    python scripts/bench_sparse.py > rows.jsonl
    python scripts/bench_sparse.py --make-openvino-env DIR > rows.jsonl     # beside OpenVINO, once more with --openvino-env

Prints one JSON row a line, for 1 thread and for `--threads`:

    product   one weight, `tokens` rows of input: seconds (median, p20, p80) of torch's bfloat16 linear and of the
              sparse one, and the processor's seconds beside those of the clock, which suffer less from other jobs; as
              many copies take turns as exceed the cache
    openvino  the dense product of one token by OpenVINO, in an environment of its own
    model     a random Llama of about 0.7 B parameters at 50 %: what `llmprune bench` reports
    files     the demo model and the same Llama at 50 % and 2:4: bytes of the pruned matrices and of all files,
              compressed over dense; bytes in memory of the same matrices, sparse over dense; seconds to load, and to load and read one token, from the
              dense files, from the compressed ones to dense, and kept sparse, and the memory that the process gained

Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

import llmprune
from llmprune.checkpoint.compressed import compress
from llmprune.checkpoint.unpacked import open_dense
from llmprune.environment import hardware, versions
from llmprune.locate import demo_folder
from llmprune.patterns import parse
from llmprune.sparse.bench import measure, weight_bytes
from llmprune.sparse.running import load
from llmprune_kernels.bitmask.layout import Bitmask
from llmprune_kernels.bitmask.ops import bitmask_linear

SHAPES = ((4096, 4096), (11008, 4096))
PATTERNS = ("50%", "70%", "2:4")
TOKENS = (1, 8, 64, 512)
COPIES_BYTES = 192 << 20
LOADS = 3  # of each model, in processes of their own
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
            packed = [Bitmask.pack(weight) for weight in dense]
            share = packed[0].nbytes() / dense[0].nbytes
            for tokens in TOKENS if pattern == "50%" else TOKENS[:1]:
                x_TI = torch.randn(tokens, shape[1]).bfloat16()
                seconds = in_turn(candidates(x_TI, dense, packed), copies, rounds if tokens < 64 else 3)
                yield {
                    "row": "product", "threads": threads, "shape": shape, "pattern": pattern, "tokens": tokens,
                    "bytes_of_dense": share, **seconds,
                }  # fmt: skip


def candidates(x_TI: Tensor, dense: list[Tensor], packed: list[Bitmask]) -> dict[str, Callable[[int], Tensor]]:
    """Return the implementations that are compared, as functions of the copy's number."""

    def sparse(index: int, expand_from: int) -> Tensor:
        matrix = packed[index]
        y_TO: Tensor = bitmask_linear(
            x_TI, matrix.masks, matrix.values, matrix.starts, matrix.inputs, None, expand_from
        )
        return y_TO

    return {
        "dense": lambda index: functional.linear(x_TI, dense[index]),
        "bitmask": lambda index: sparse(index, len(x_TI) + 1),
        "expand": lambda index: sparse(index, 0),
    }


def in_turn(functions: dict[str, Callable[[int], Tensor]], copies: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of each function, and their speed over dense.

    In a round each function in turn goes through all copies, as a model goes through its layers: what one leaves to be
    written back to memory would otherwise be paid for by the next.
    """
    taken: dict[str, list[float]] = {name: [] for name in functions}
    worked: dict[str, float] = dict.fromkeys(functions, 0.0)
    for _ in range(rounds):
        for name, function in functions.items():
            function(copies - 1)
            working = time.process_time()
            for number in range(copies):
                began = time.perf_counter()
                function(number)
                taken[name].append(time.perf_counter() - began)
            worked[name] += time.process_time() - working
    seconds = {name: np.array(values) for name, values in taken.items()}
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return {
        "seconds": {
            name: [float(value) for value in np.percentile(all_, (50, 20, 80))] for name, all_ in seconds.items()
        },
        "fastest": {name: float(all_.min()) for name, all_ in seconds.items()},
        "speedup_median": {name: medians["dense"] / median for name, median in medians.items()},
        "speedup_processor": {name: worked["dense"] / spent for name, spent in worked.items()},
        "speedup_fastest": {name: float(seconds["dense"].min() / all_.min()) for name, all_ in seconds.items()},
    }


def openvino_rows(python: Path, threads: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of OpenVINO, run by the Python of its environment."""
    script = Path(__file__).with_name("openvino_product.py")
    command = [str(python), str(script), "--threads", str(threads), "--rounds", str(rounds)]
    command += ["--shapes", *(f"{outputs}x{inputs}" for outputs, inputs in SHAPES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    yield from map(json.loads, done.stdout.splitlines())


def make_openvino_environment(folder: Path) -> None:
    """Make the environment that OpenVINO runs in."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "openvino", "numpy"], check=True, stdout=sys.stderr)


def random_llama(pattern: str = "50%") -> Any:
    """Return a random bfloat16 Llama whose blocks are pruned to the pattern."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA, dtype=torch.bfloat16))
    model.to(torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = layer.weight.data
            weight.masked_fill_(~parse(pattern).keep(weight.abs().float()), 0)
    return model.eval()


def model_row(model: Any, threads: int, batch: int, rounds: int) -> dict[str, Any]:
    """Return what `llmprune bench` says of the model, for prompts of 512 tokens in all."""
    setting = {"prompt_tokens": 512 // batch, "new_tokens": 16, "batch": batch, "rounds": rounds}
    return {"row": "model", "threads": threads, **measure(model, "random Llama 0.7 B, 50 %", setting).to_json()}


def file_rows(threads: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each model and pattern: sizes on disk and in memory, and the seconds that loading takes."""
    with tempfile.TemporaryDirectory() as folder:
        for pattern in ("50%", "2:4"):
            dense = Path(folder) / "demo" / pattern
            llmprune.prune("demo", dense, method="magnitude", pattern=pattern)
            yield {"row": "files", "threads": threads, "model": "demo", "pattern": pattern, **file_figures(dense)}
            dense = Path(folder) / "llama" / pattern
            random_llama(pattern).save_pretrained(dense)
            yield {"row": "files", "threads": threads, "model": "0.7 B", "pattern": pattern, **file_figures(dense)}
            shutil.rmtree(dense.parent)


def file_figures(dense: Path) -> dict[str, Any]:
    """Return the figures of one model, of which the compressed twin is written beside it."""
    small = dense.with_name(f"{dense.name}.small")
    sizes = compress(dense, small).to_json()
    how = {"dense": (dense, "dense"), "small": (small, "dense"), "small, kept sparse": (small, "sparse")}
    loaded: dict[str, list[dict[str, float]]] = {name: [] for name in how}
    for _ in range(LOADS):
        for name, (path, runtime) in how.items():
            loaded[name].append(in_new_process(path, runtime))
    matrices = [
        entry
        for entry in open_dense(small).entries.values()
        if len(entry.shape) == 2 and "embed" not in entry.name and "lm_head" not in entry.name
    ]
    packed = sum(Bitmask.pack(tensor).nbytes() for tensor in _tensors(dense, [entry.name for entry in matrices]))
    return {
        "matrices_on_disk": sizes["packed_bytes"] / sizes["dense_bytes"],
        "files_on_disk": sizes["compressed_file_bytes"] / sizes["dense_file_bytes"],
        "matrices_in_memory": packed / sum(2 * entry.count for entry in matrices),
        "load_seconds": {name: float(np.median([run["seconds"] for run in runs])) for name, runs in loaded.items()},
        "first_token_seconds": {
            name: float(np.median([run["first_token"] for run in runs])) for name, runs in loaded.items()
        },
        "resident_bytes": {name: float(np.median([run["resident"] for run in runs])) for name, runs in loaded.items()},
        "bytes_of_weights": {name: runs[0]["weights"] for name, runs in loaded.items()},
    }


def _tensors(folder: Path, names: list[str]) -> Iterator[Tensor]:
    source = open_dense(folder)
    for name in names:
        with source.slices([name]) as opened:
            yield opened[name][...]


def in_new_process(path: Path, runtime: str) -> dict[str, float]:
    """Load a model in a process of its own; return the seconds, and the bytes that it occupies and that it holds."""
    command = [sys.executable, __file__, "--load", str(path), "--runtime", runtime]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def load_once(path: str, runtime: str) -> dict[str, float]:
    """Load a model; the gate's timings of layers that are kept sparse are on disk from the second time on."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"quantization_config": llmprune.SparseConfig("sparse")} if runtime == "sparse" else {}
    load(open_dense(demo_folder()))  # what every first load pays for
    gc.collect()
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
    seconds = time.perf_counter() - began
    with torch.inference_mode():  # dense files are mapped, and only read now
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    first_token = time.perf_counter() - began
    gc.collect()
    resident = psutil.Process().memory_info().rss - before
    return {"seconds": seconds, "first_token": first_token, "resident": resident, "weights": weight_bytes(model)}


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="measured beside 1 thread [default: 2]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("product", "model", "files"))
    parser.add_argument("--openvino-env", type=Path, metavar="DIR", help="measure beside OpenVINO of that environment")
    parser.add_argument("--make-openvino-env", type=Path, metavar="DIR", help="make that environment first")
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)  # what `in_new_process` runs
    parser.add_argument("--runtime", default="dense", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        print(json.dumps(load_once(asked.load, asked.runtime)))
        return
    if asked.make_openvino_env:
        make_openvino_environment(asked.make_openvino_env)
    openvino = asked.make_openvino_env or asked.openvino_env
    print(json.dumps({"row": "where", **hardware(), "versions": versions()}), flush=True)
    python = openvino / "bin" / "python" if openvino else None
    for row in rows(asked.only, sorted({1, asked.threads}), asked.rounds, python):
        print(json.dumps(row), flush=True)
        print(row["row"], row["threads"], file=sys.stderr)


def rows(only: str | None, threads: list[int], rounds: int, openvino: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the rows that were asked for."""
    if only in (None, "product"):
        for count in threads:
            torch.set_num_threads(count)
            yield from product_rows(count, rounds)
            if openvino:
                yield from openvino_rows(openvino, count, rounds)
    if only in (None, "model"):
        model = random_llama()
        for count in threads:
            torch.set_num_threads(count)
            yield from (model_row(model, count, batch, rounds) for batch in (1, 8))
        del model
    if only in (None, "files"):
        yield from file_rows(torch.get_num_threads())


if __name__ == "__main__":
    main()
