"""The gate to `llmprune_kernels`: the one place that decides which implementation of an op runs.

`obs_masked` and `obs_nm` round as the paper's code does; `prune_masked` and `prune_nm` are free in how they sum.
"""

from types import ModuleType

import torch
from torch import Tensor

from llmprune_kernels.gram import native as gram_native
from llmprune_kernels.obs import native as obs_native
from llmprune_kernels.obs import recursive, reference
from llmprune_kernels.select import native as select_native

_MANY = 1 << 15  # numbers, from which on counting them beats a partition


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """See `llmprune_kernels.obs.reference.obs_masked`."""
    errors: Tensor = _obs(block_BO, reference).obs_masked(block_BO, upper_BB, keep_BO)
    return errors


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """See `llmprune_kernels.obs.reference.obs_nm`."""
    errors_and_mask: tuple[Tensor, Tensor] = _obs(block_BO, reference).obs_nm(block_BO, upper_BB, n, m)
    return errors_and_mask


def prune_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """See `llmprune_kernels.obs.recursive.prune_masked`."""
    _obs(block_BO, recursive).prune_masked(block_BO, upper_BB, keep_BO)


def prune_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """See `llmprune_kernels.obs.recursive.prune_nm`."""
    mask: Tensor = _obs(block_BO, recursive).prune_nm(block_BO, upper_BB, n, m)
    return mask


def selects(score_C: Tensor) -> bool:
    """Say whether `kth_smallest` is there for these numbers, and faster than a partition."""
    many = score_C.numel() >= _MANY and score_C.is_contiguous()
    return many and score_C.device.type == "cpu" and score_C.dtype == torch.float32 and select_native.available()


def kth_smallest(score_C: Tensor, k: int) -> float:
    """See `llmprune_kernels.select.native.kth_smallest`."""
    return select_native.kth_smallest(score_C, k)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether products of bfloat16, summed in fp32, are faster there than those of fp32."""
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else gram_native.available()


def add_gram(out_II: Tensor, x_TI: Tensor, scale: float, before: float) -> None:
    """Overwrite `out_II` (fp32) with `before` times itself plus `scale` XᵀX, X of bfloat16.

    What lies right of the diagonal's squares of 256 may stay undefined, as it mirrors the rest.
    """
    if x_TI.device.type == "cpu":
        gram_native.add_gram(out_II, x_TI, scale, before)
    else:
        add_product(out_II, x_TI, x_TI, scale, before)


def add_product(out_II: Tensor, x_TI: Tensor, y_TI: Tensor, scale: float, before: float) -> None:
    """Overwrite `out_II` (fp32) with `before` times itself plus `scale` XᵀY, X and Y of bfloat16."""
    if x_TI.device.type == "cpu":
        gram_native.add_product(out_II, x_TI, y_TI, scale, before)
    else:
        out_II.mul_(before).add_(torch.mm(x_TI.T, y_TI, out_dtype=torch.float32), alpha=scale)


def _obs(block_BO: Tensor, otherwise: ModuleType) -> ModuleType:
    return obs_native if block_BO.device.type == "cpu" and obs_native.available() else otherwise
