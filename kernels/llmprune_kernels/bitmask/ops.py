"""The sparse linear layer as a torch operator, so that `torch.compile` sees one node with a known shape.

`torch.ops.llmprune.bitmask_linear(x, masks, values, starts, bias, expand_from)` is `functional.linear` with a weight in
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
    "bitmask_linear(Tensor x, Tensor masks, Tensor values, Tensor starts, Tensor? bias, int expand_from) -> Tensor"
)


def _linear(x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None, expand_from: int) -> Tensor:
    inputs = x.shape[-1]
    matrix = Bitmask(masks, values, starts, inputs)
    tokens = math.prod(x.shape[:-1])
    product = multiply_expanded if tokens >= expand_from else multiply
    y_TO = product(x.reshape(tokens, inputs), matrix)
    if bias is not None:
        y_TO += bias
    return y_TO.to(x.dtype).view(*x.shape[:-1], matrix.outputs)


def _shape(x: Tensor, masks: Tensor, values: Tensor, starts: Tensor, bias: Tensor | None, expand_from: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], masks.shape[0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, masks, values, starts, bias, _ = inputs
    ctx.matrix = Bitmask(masks, values, starts, x.shape[-1])
    ctx.biased = bias is not None


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and bias: adapters beside sparse layers can be trained, the layers cannot."""
    of_x = gradient @ expand(ctx.matrix)
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
    return of_x, None, None, None, of_bias, None


_library.impl("bitmask_linear", _linear, "CPU")
torch.library.register_fake("llmprune::bitmask_linear", _shape, lib=_library)
torch.library.register_autograd("llmprune::bitmask_linear", _gradients, setup_context=_remember, lib=_library)

bitmask_linear = torch.ops.llmprune.bitmask_linear.default
