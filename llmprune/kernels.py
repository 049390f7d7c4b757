"""The gate to `llmprune_kernels`: the one place that decides which implementation of an op runs.

`obs_masked` and `obs_nm` round as the paper's code does; `prune_masked` and `prune_nm` are free in how they sum. On a GPU
all four are one Triton kernel, where Triton is installed and the block is one that it takes. `lowest` and
`keep_highest` choose by score without waiting for the GPU.
"""

import importlib.util
from types import ModuleType

from torch import Tensor

from llmprune_kernels.obs import recursive, reference
from llmprune_kernels.obs.selection import keep_highest
from llmprune_kernels.selection.digits import lowest

__all__ = ["keep_highest", "lowest", "obs_masked", "obs_nm", "prune_masked", "prune_nm"]


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """As `llmprune_kernels.obs.reference.obs_masked`."""
    errors: Tensor = (_fused(block_BO) or reference).obs_masked(block_BO, upper_BB, keep_BO)
    return errors


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `llmprune_kernels.obs.reference.obs_nm`."""
    found: tuple[Tensor, Tensor] = (_fused(block_BO, m) or reference).obs_nm(block_BO, upper_BB, n, m)
    return found


def prune_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """As `llmprune_kernels.obs.recursive.prune_masked`."""
    (_fused(block_BO) or recursive).prune_masked(block_BO, upper_BB, keep_BO)


def prune_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """As `llmprune_kernels.obs.recursive.prune_nm`."""
    keep_BO: Tensor = (_fused(block_BO, m) or recursive).prune_nm(block_BO, upper_BB, n, m)
    return keep_BO


def _fused(block_BO: Tensor, m: int = 1) -> ModuleType | None:
    """Return the Triton kernel if it can run here."""
    if block_BO.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from llmprune_kernels.obs import triton

    return triton if triton.serves(block_BO, m) else None
