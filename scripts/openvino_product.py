"""The same products as `bench_sparse.py`, dense in bfloat16 by OpenVINO; it runs in an environment of its own.

    pip install openvino numpy && python openvino_product.py --threads 1

Prints a JSON row for each shape: seconds (median, p20, p80) of one token, as many weights taking turns as exceed the
cache.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

COPIES_BYTES = 192 << 20


def compiled(core: Any, weight: Any, threads: int) -> Any:
    """Return a compiled model that multiplies one token by a weight [O, I]."""
    x = ops.parameter([1, weight.shape[1]], np.float32)
    model = ov.Model([ops.matmul(x, ops.constant(weight), False, True)], [x])
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    return core.compile_model(model, "CPU", hints)


def seconds(shape: tuple[int, int], threads: int, rounds: int) -> tuple[list[float], str]:
    """Return the seconds of each call, and the type that was computed in."""
    random = np.random.default_rng(0)
    copies = max(2, COPIES_BYTES // (2 * shape[0] * shape[1]))
    core = ov.Core()
    requests, computed = [], ""
    for _ in range(copies):
        weight = random.standard_normal(shape, np.float32) * np.float32(0.02)
        model = compiled(core, weight, threads)
        requests.append(model.create_infer_request())
        computed = str(model.get_property("INFERENCE_PRECISION_HINT"))
    x = random.standard_normal((1, shape[1]), np.float32)
    taken = []
    for number in range(copies * (rounds + 1)):
        began = time.perf_counter()
        requests[number % copies].infer([x], share_inputs=True)
        if number >= copies:
            taken.append(time.perf_counter() - began)
    return taken, computed


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096"], help="outputs x inputs")
    asked = parser.parse_args()
    for text in asked.shapes:
        outputs, inputs = map(int, text.split("x"))
        taken, computed = seconds((outputs, inputs), asked.threads, asked.rounds)
        figures = [float(value) for value in np.percentile(taken, (50, 20, 80))]
        row = {"row": "openvino", "threads": asked.threads, "shape": [outputs, inputs], "tokens": 1, "seconds": figures}
        print(json.dumps({**row, "computed_in": computed, "version": ov.__version__}), flush=True)


if __name__ == "__main__":
    main()
