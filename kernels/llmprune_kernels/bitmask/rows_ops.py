"""Products with bitmask weights in the layout of `rows` as torch operators: on the CPU in torch, on a GPU the kernels.

`x` is [T, I], what comes out [T, O] of the same dtype. The gradient of `x` is known, that of the weight is not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.bitmask import rows

_library = torch.library.Library("llmprune", "FRAGMENT")
_library.define("bitmask_rows(Tensor x, Tensor masks, Tensor values, Tensor starts, Tensor counts) -> Tensor")
_library.define("bitmask_rows_expand(Tensor masks, Tensor values, Tensor starts, Tensor counts, int inputs) -> Tensor")


def _linear_on_cpu(x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    return functional.linear(x, rows.expand(masks, values, x.shape[1]))


def _linear_on_gpu(x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    from llmprune_kernels.bitmask import triton

    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        return triton.linear(x, masks, values, starts, counts)


def _linear_shape(x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], masks.shape[0])


def _expand_on_cpu(masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor, inputs: int) -> Tensor:
    return rows.expand(masks, values, inputs)


def _expand_on_gpu(masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor, inputs: int) -> Tensor:
    from llmprune_kernels.bitmask import triton

    with torch.cuda.device_of(masks):
        return triton.expand(masks, values, starts, counts, inputs)


def _expand_shape(masks: Tensor, values: Tensor, starts: Tensor, counts: Tensor, inputs: int) -> Tensor:
    return values.new_empty(masks.shape[0], inputs)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.packed, ctx.inputs = inputs[1:], inputs[0].shape[1]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient @ expand(*ctx.packed, ctx.inputs), None, None, None, None


for _name, _on_cpu, _on_gpu, _shape in (
    ("bitmask_rows", _linear_on_cpu, _linear_on_gpu, _linear_shape),
    ("bitmask_rows_expand", _expand_on_cpu, _expand_on_gpu, _expand_shape),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_gpu, "CUDA")
    torch.library.register_fake(f"llmprune::{_name}", _shape, lib=_library)
torch.library.register_autograd("llmprune::bitmask_rows", _gradient, setup_context=_remember, lib=_library)

linear = torch.ops.llmprune.bitmask_rows.default
expand = torch.ops.llmprune.bitmask_rows_expand.default
