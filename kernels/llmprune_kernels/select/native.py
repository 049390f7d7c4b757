"""Selection by the compiled kernel, on the CPU, on all threads.

Shape suffixes: G groups, M numbers of a group.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.native import library

GROUPS = (4, 8)  # numbers of a group that `keep_highest` takes; of more a partition is as fast


def available() -> bool:
    """Say whether the kernel is there."""
    return _compiled() is not None


def keep_highest(score_GM: Tensor, n: int) -> Tensor:
    """Mark the `n` highest of every group of fp32 scores (not NaN); among equals the lowest index goes first."""
    groups, m = score_GM.shape
    if score_GM.dtype != torch.float32 or not score_GM.is_contiguous() or m not in GROUPS or not 0 <= n <= m:
        raise ValueError(
            f"dense float32 scores in groups of {GROUPS}, of which at most all are kept, are needed, not {n} of "
            f"{list(score_GM.shape)} {score_GM.dtype} of strides {score_GM.stride()}"
        )
    keep_GM = torch.empty_like(score_GM, dtype=torch.bool)
    _compiled().select_highest(score_GM.data_ptr(), groups, n, m, keep_GM.data_ptr(), torch.get_num_threads())
    return keep_GM


def kth_smallest(score_C: Tensor, k: int) -> float:
    """Return the `k`-th smallest (1 is the smallest) of the numbers, fp32 and none of them NaN."""
    if score_C.dtype != torch.float32 or not score_C.is_contiguous() or not 1 <= k <= score_C.numel():
        raise ValueError(f"dense float32 numbers, at least {k} of them, are needed, not {score_C.dtype}")
    return float(_compiled().select_kth(score_C.data_ptr(), score_C.numel(), k, torch.get_num_threads()))


@functools.cache
def _compiled() -> Any:  # None where there is no library; callers ask `available` first
    native = library()
    if native is not None:
        native.select_kth.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
        native.select_kth.restype = ctypes.c_float
        native.select_highest.argtypes = (
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int
        )  # fmt: skip
        native.select_highest.restype = None
    return native
