"""Products of bfloat16 inputs by the compiled kernel, which sums in fp32: on CPUs that multiply bfloat16.

Shape suffixes: T tokens, I inputs.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.native import cpu_level, declared

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {"gram_bf16": (_P, _L, _P, _L, _L, _L, _F, _F, _P, _L, _P, _I)}
TILE = 64  # a panel of the kernel


def available() -> bool:
    """Say whether this CPU multiplies bfloat16, and the kernel is there."""
    return _compiled() is not None and cpu_level() >= 2


def add_product(out_II: Tensor, x_TI: Tensor, y_TI: Tensor, scale: float, before: float) -> None:
    """Overwrite `out_II` (fp32, dense) with `before` times itself plus `scale` XᵀY, X and Y of bfloat16."""
    _add(out_II, x_TI, y_TI, scale, before, 0)


def add_gram(out_II: Tensor, x_TI: Tensor, scale: float, before: float) -> None:
    """As `add_product` with Y = X; what lies right of the diagonal's squares of `TILE` stays undefined."""
    _add(out_II, x_TI, x_TI, scale, before, TILE)


def _add(out_II: Tensor, x_TI: Tensor, y_TI: Tensor, scale: float, before: float, tile: int) -> None:
    if out_II.dtype != torch.float32 or not out_II.is_contiguous():
        raise ValueError(f"the sum must be dense and float32, not {out_II.dtype} of strides {out_II.stride()}")
    if x_TI.dtype != torch.bfloat16 or y_TI.dtype != torch.bfloat16 or x_TI.shape != y_TI.shape:
        raise ValueError(f"bfloat16 inputs of one shape are needed, not {x_TI.dtype} and {y_TI.dtype}")
    if not len(x_TI):
        out_II.mul_(before)
        return
    native, same = _compiled(), y_TI is x_TI
    x_TI = x_TI.contiguous()
    y_TI = x_TI if same else y_TI.contiguous()
    packed = torch.empty(native.gram_words(x_TI.shape[1]) * (1 if same else 2), dtype=torch.int32)
    matrices = (x_TI.data_ptr(), x_TI.stride(0), y_TI.data_ptr(), y_TI.stride(0), *x_TI.shape)
    native.gram_bf16(*matrices, scale, before, out_II.data_ptr(), tile, packed.data_ptr(), torch.get_num_threads())


@functools.cache
def _compiled() -> Any:  # None where there is no library; callers ask `available` first
    native = declared(_SIGNATURES)
    if native is not None:
        native.gram_words.argtypes, native.gram_words.restype = (_L,), _L
    return native
