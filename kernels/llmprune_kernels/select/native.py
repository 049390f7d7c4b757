"""Selection by the compiled kernel, on the CPU: two passes over the numbers, on all threads."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from llmprune_kernels.native import library


def available() -> bool:
    """Say whether the kernel is there."""
    return _compiled() is not None


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
    return native
