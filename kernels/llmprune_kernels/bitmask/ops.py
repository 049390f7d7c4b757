"""The sparse linear layer as a torch operator, so that `torch.compile` sees one node with a known shape.

`torch.ops.llmprune.bitmask_linear(x, masks, values, starts, inputs, bias, expand_from)` is `functional.linear` with a weight in
the layout of `layout.py`. From `expand_from` tokens on it makes the weight dense, some rows at a time, and leaves the
product to torch: with many tokens the product costs far more than the expansion.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.bitmask.layout import Bitmask, expand, multiply, multiply_expanded

_library = torch.library.Library("llmprune", "DEF")
_library.define(
    "bitmask_linear(Tensor x, Tensor masks, Tensor values, Tensor starts, int inputs, Tensor? bias, int expand_from)"
    " -> Tensor"
)


def _linear(
    x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, inputs: int, bias: Tensor | None, expand_from: int
) -> Tensor:
    _require_fitting(x, values, inputs)
    matrix = Bitmask(masks, values, starts, inputs)
    tokens = math.prod(x.shape[:-1])
    product = multiply_expanded if tokens >= expand_from else multiply
    y_TO = product(x.reshape(tokens, inputs), matrix)
    if bias is not None:
        y_TO += bias
    return y_TO.to(x.dtype).view(*x.shape[:-1], matrix.outputs)


def _require_fitting(x: Tensor, values: Tensor, inputs: int) -> None:
    """Raise RuntimeError as torch does for a linear layer: the kernels do not look."""
    if x.shape[-1] != inputs:
        raise RuntimeError(f"the input has {x.shape[-1]} columns, the weight {inputs}")
    if x.dtype != values.dtype:
        raise RuntimeError(f"the input is {x.dtype}, the weight {values.dtype}")


def _shape(
    x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, inputs: int, bias: Tensor | None, expand_from: int
) -> Tensor:
    _require_fitting(x, values, inputs)
    return x.new_empty(*x.shape[:-1], masks.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, masks, values, starts, columns, bias, _ = inputs
    ctx.matrix = Bitmask(masks, values, starts, columns)
    ctx.biased = bias is not None


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and bias: adapters beside sparse layers can be trained, the layers cannot."""
    of_x = gradient @ expand(ctx.matrix)
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
    return of_x, None, None, None, None, of_bias, None


_library.impl("bitmask_linear", _linear, "CPU")
torch.library.register_fake("llmprune::bitmask_linear", _shape, lib=_library)
torch.library.register_autograd("llmprune::bitmask_linear", _gradients, setup_context=_remember, lib=_library)

bitmask_linear = torch.ops.llmprune.bitmask_linear.default
