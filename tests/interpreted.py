"""Run by tests in a process of its own, as Triton's interpreter must be asked for before Triton is imported.

Prints, as JSON, the largest error of each kernel against float64, relative to the largest output, and whether weights
expand to their bits. Every output begins as NaN.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.bitmask import rows
from llmprune_kernels.bitmask import triton as bitmask
from llmprune_kernels.two_four import fragments, reference
from llmprune_kernels.two_four import triton as two_four

TOKENS = (0, 1, 2, 5, 8, 9, 16, 33, 64)


def weight(outputs: int, inputs: int, dtype: torch.dtype, pattern: str) -> Tensor:
    """Return a random weight with an empty row and, in another, groups that keep one value only."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    groups = torch.randn(outputs, inputs // 4, 4, generator=generator)
    if pattern == "2:4":
        groups.scatter_(2, groups.abs().topk(2, -1, largest=False).indices, 0)
    else:
        groups.masked_fill_(torch.rand(groups.shape, generator=generator) < float(pattern), 0)
    groups[0] = 0
    groups[1, :, :3] = 0
    return groups.view(outputs, inputs).to(dtype)


def error(found_TO: Tensor, x_TI: Tensor, weight_OI: Tensor) -> float:
    """Return the largest error, relative to the largest output; infinite where anything is not finite."""
    expected_TO = x_TI.double() @ weight_OI.double().T
    if found_TO.shape != expected_TO.shape or not bool(found_TO.isfinite().all()):
        return float("inf")
    return float((found_TO.double() - expected_TO).abs().max() / expected_TO.abs().max()) if len(x_TI) else 0.0


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return tokens whose rows are not contiguous in memory."""
    return torch.randn(columns, tokens, generator=torch.Generator().manual_seed(tokens)).to(dtype).T


def two_four_rows() -> Iterator[dict[str, Any]]:
    """Yield what the kernels of 2:4 weights come to."""
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((5, 32), (33, 1056), (33, 160)):
            dense = weight(*shape, dtype, "2:4")
            packed = reference.pack(dense)
            for tokens in TOKENS if shape != (33, 1056) else (1, 17):
                x = inputs(tokens, shape[1], dtype)
                yield {"dtype": str(dtype), "error": error(two_four.linear(x, *packed), x, dense)}
            words = fragments.pack(dense)
            found = [two_four.expand(*packed, *shape, dtype, False), two_four.expand(*words, *shape, dtype, True)]
            yield {"same": all(torch.equal(each, dense) for each in found)}
        narrow = weight(17, 36, dtype, "2:4")
        yield {"same": torch.equal(two_four.expand(*fragments.pack(narrow), 17, 36, dtype, True), narrow)}


def bitmask_rows() -> Iterator[dict[str, Any]]:
    """Yield what the kernels of bitmask weights come to."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape, kept in (((5, 128), "0.5"), ((9, 1032), "0.7"), ((3, 1024), "0.0"), ((4, 44), "0.97")):
            dense = weight(*shape, dtype, kept)
            dense[2, 3] = -0.0
            packed = rows.pack(dense)
            for tokens in TOKENS if shape == (5, 128) else (1, 3):
                x = inputs(tokens, shape[1], dtype)
                yield {"dtype": str(dtype), "error": error(bitmask.linear(x, *packed), x, dense)}
            integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
            same = torch.equal(bitmask.expand(*packed, shape[1]).view(integers), dense.view(integers))
            yield {"same": same}


if __name__ == "__main__":
    assert two_four.INTERPRETED and bitmask.INTERPRETED
    torch.use_deterministic_algorithms(True)  # with it, all memory that torch hands out begins as NaN
    assert bool(torch.empty(1).isnan())
    print(json.dumps([*two_four_rows(), *bitmask_rows()]))
