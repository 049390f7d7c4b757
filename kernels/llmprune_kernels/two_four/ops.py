"""Products with 2:4 weights as torch operators: on the CPU the reference, on a GPU the kernels.

`x` is [T, I], what comes out [T, O] of the same dtype. The gradient of `x` is known, so that adapters beside sparse
layers can be trained; that of the weight is not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.two_four import fragments, reference

_LIBRARY_ROWS = 8  # of x: cuSPARSELt takes multiples of it

_library = torch.library.Library("llmprune", "FRAGMENT")
_library.define("two_four_mma(Tensor x, Tensor values, Tensor places, int outputs) -> Tensor")
_library.define("two_four_pairs(Tensor x, Tensor pairs, Tensor codes) -> Tensor")
_library.define("two_four_cusparselt(Tensor x, Tensor packed, int outputs, int algorithm) -> Tensor")
_library.define(
    "two_four_expand(Tensor words, Tensor codes, int outputs, int inputs, ScalarType dtype, bool fragments) -> Tensor"
)


def _mma_on_cpu(x: Tensor, values: Tensor, places: Tensor, outputs: int) -> Tensor:
    return functional.linear(x, fragments.expand(values, places, outputs, x.shape[1], x.dtype))


def _mma_on_gpu(x: Tensor, values: Tensor, places: Tensor, outputs: int) -> Tensor:
    from llmprune_kernels.two_four import triton_mma

    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        return triton_mma.linear(x, values, places, outputs)


def _mma_shape(x: Tensor, values: Tensor, places: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _pairs_on_gpu(x: Tensor, pairs: Tensor, codes: Tensor) -> Tensor:
    from llmprune_kernels.two_four import triton

    with torch.cuda.device_of(x):
        return triton.linear(x, pairs, codes)


def _pairs_shape(x: Tensor, pairs: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], pairs.shape[0])


def _cusparselt(x: Tensor, packed: Tensor, outputs: int, algorithm: int) -> Tensor:
    y_TO: Tensor = torch._cslt_sparse_mm(packed, filled(x).t(), transpose_result=True, alg_id=algorithm)
    return y_TO[: len(x)]


def _cusparselt_shape(x: Tensor, packed: Tensor, outputs: int, algorithm: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _expand_on_cpu(
    words: Tensor, codes: Tensor, outputs: int, inputs: int, dtype: torch.dtype, of_fragments: bool
) -> Tensor:
    if of_fragments:
        return fragments.expand(words, codes, outputs, inputs, dtype)
    return reference.expand(words, codes, dtype)


def _expand_on_gpu(
    words: Tensor, codes: Tensor, outputs: int, inputs: int, dtype: torch.dtype, of_fragments: bool
) -> Tensor:
    from llmprune_kernels.two_four import triton

    with torch.cuda.device_of(words):
        return triton.expand(words, codes, outputs, inputs, dtype, of_fragments)


def _expand_shape(
    words: Tensor, codes: Tensor, outputs: int, inputs: int, dtype: torch.dtype, of_fragments: bool
) -> Tensor:
    return words.new_empty(outputs, inputs, dtype=dtype)


def filled(x_TI: Tensor) -> Tensor:
    """Return x with as many rows of zeros more as cuSPARSELt asks for."""
    return functional.pad(x_TI, (0, 0, 0, -len(x_TI) % _LIBRARY_ROWS))


def _remember_mma(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, places, outputs = inputs
    ctx.expand = (values, places, outputs, x.shape[1], x.dtype, True)


def _remember_pairs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, pairs, codes = inputs
    ctx.expand = (pairs, codes, pairs.shape[0], x.shape[1], x.dtype, False)


def _mma_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient @ expand(*ctx.expand), None, None, None


def _pairs_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient @ expand(*ctx.expand), None, None


for _name, _on_cpu, _on_gpu, _shape in (
    ("two_four_mma", _mma_on_cpu, _mma_on_gpu, _mma_shape),
    ("two_four_pairs", reference.linear, _pairs_on_gpu, _pairs_shape),
    ("two_four_cusparselt", _cusparselt, _cusparselt, _cusparselt_shape),
    ("two_four_expand", _expand_on_cpu, _expand_on_gpu, _expand_shape),
):
    _library.impl(_name, _on_cpu, "CPU")
    _library.impl(_name, _on_gpu, "CUDA")
    torch.library.register_fake(f"llmprune::{_name}", _shape, lib=_library)
torch.library.register_autograd("llmprune::two_four_mma", _mma_gradient, setup_context=_remember_mma, lib=_library)
torch.library.register_autograd(
    "llmprune::two_four_pairs", _pairs_gradient, setup_context=_remember_pairs, lib=_library
)

mma = torch.ops.llmprune.two_four_mma.default
pairs = torch.ops.llmprune.two_four_pairs.default
cusparselt = torch.ops.llmprune.two_four_cusparselt.default
expand = torch.ops.llmprune.two_four_expand.default
