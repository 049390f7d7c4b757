"""The recursion by the compiled kernel, on the CPU: `obs_*` as reference.py to the bit, `prune_*` as recursive.py.

Shape suffixes: B columns (inputs) of the block, O outputs, M columns of an N:M group.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.native import cpu_level, declared

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "obs_paper": (_P, _L, _P, _L, _P, _P, _L, _L, _L, _L, _I, _I),
    "obs_fast": (_P, _L, _P, _L, _P, _L, _L, _L, _L, _I, _I),
}


def available() -> bool:
    """Say whether there is a kernel for this CPU."""
    return _compiled() is not None and cpu_level() > 0


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """As `reference.obs_masked`."""
    return _paper(block_BO, upper_BB, keep_BO.contiguous(), 0, 0)


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `reference.obs_nm`."""
    keep_BO = torch.empty(block_BO.shape, dtype=torch.bool)
    return _paper(block_BO, upper_BB, keep_BO, n, m), keep_BO


def prune_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """As `recursive.prune_masked`."""
    _fast(block_BO, upper_BB, keep_BO.contiguous(), 0, 0)


def prune_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """As `recursive.prune_nm`."""
    keep_BO = torch.empty(block_BO.shape, dtype=torch.bool)
    _fast(block_BO, upper_BB, keep_BO, n, m)
    return keep_BO


def _paper(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor, n: int, m: int) -> Tensor:
    error_BO, upper_BB = torch.empty_like(block_BO, memory_format=torch.contiguous_format), upper_BB.contiguous()
    matrices = (*_matrices(block_BO, upper_BB), keep_BO.data_ptr(), error_BO.data_ptr())
    _compiled().obs_paper(*matrices, *block_BO.shape, n, m, torch.get_num_threads(), cpu_level())
    return error_BO


def _fast(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor, n: int, m: int) -> None:
    upper_BB = upper_BB.contiguous()
    matrices = (*_matrices(block_BO, upper_BB), keep_BO.data_ptr())
    _compiled().obs_fast(*matrices, *block_BO.shape, n, m, torch.get_num_threads(), cpu_level())


def _matrices(block_BO: Tensor, upper_BB: Tensor) -> tuple[int, int, int, int]:
    """Return the addresses of both matrices, each with the distance of its rows."""
    for matrix in (block_BO, upper_BB):
        if matrix.dtype != torch.float32 or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
            raise ValueError(f"rows must be dense and float32, not {matrix.dtype} of strides {matrix.stride()}")
    return block_BO.data_ptr(), block_BO.stride(0), upper_BB.data_ptr(), upper_BB.stride(0)


@functools.cache
def _compiled() -> Any:  # None where there is no library; callers ask `available` first
    return declared(_SIGNATURES)
