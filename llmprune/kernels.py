"""The gate to `llmprune_kernels`: the one place that decides which implementation of an op runs.

`obs_masked` and `obs_nm` round as the paper's code does; `prune_masked` and `prune_nm` are free in how they sum. On a GPU
all four are one Triton kernel, where Triton is installed and the block is one that it takes. `lowest` and
`keep_highest` choose by score without waiting for the GPU.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from llmprune_kernels.gram import cuda as gram_cuda
from llmprune_kernels.gram import native as gram_native
from llmprune_kernels.native import cpu_level
from llmprune_kernels.obs import native as obs_native
from llmprune_kernels.obs import recursive, reference
from llmprune_kernels.obs.selection import keep_highest
from llmprune_kernels.precision import tf32
from llmprune_kernels.select import native as select_native
from llmprune_kernels.select.topk import lowest

__all__ = [
    "add_gram", "add_product", "keep_highest", "keep_highest_of_groups", "kth_smallest", "lowest", "multiplies",
    "multiplies_bfloat16", "obs_masked", "obs_nm", "prune_masked", "prune_nm", "selects", "takes_batches", "tf32",
]  # fmt: skip

_MANY = 1 << 15  # numbers, from which on counting them beats a partition


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """See `llmprune_kernels.obs.reference.obs_masked`."""
    errors: Tensor = _obs(block_BO, reference).obs_masked(block_BO, upper_BB, keep_BO)
    return errors


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """See `llmprune_kernels.obs.reference.obs_nm`."""
    errors_and_mask: tuple[Tensor, Tensor] = _obs(block_BO, reference, m).obs_nm(block_BO, upper_BB, n, m)
    return errors_and_mask


def prune_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """See `llmprune_kernels.obs.recursive.prune_masked`."""
    _obs(block_BO, recursive).prune_masked(block_BO, upper_BB, keep_BO)


def prune_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """See `llmprune_kernels.obs.recursive.prune_nm`."""
    mask: Tensor = _obs(block_BO, recursive, m).prune_nm(block_BO, upper_BB, n, m)
    return mask


def selects(score_C: Tensor) -> bool:
    """Say whether `kth_smallest` is there for these numbers, and faster than a partition."""
    many = score_C.numel() >= _MANY and score_C.is_contiguous()
    return many and score_C.device.type == "cpu" and score_C.dtype == torch.float32 and select_native.available()


def kth_smallest(score_C: Tensor, k: int) -> float:
    """See `llmprune_kernels.select.native.kth_smallest`."""
    return select_native.kth_smallest(score_C, k)


def keep_highest_of_groups(score_GM: Tensor, n: int) -> Tensor | None:
    """See `llmprune_kernels.select.native.keep_highest`; None where that does not take these scores."""
    takes = score_GM.device.type == "cpu" and score_GM.dtype == torch.float32 and score_GM.is_contiguous()
    if not takes or score_GM.shape[1] not in select_native.GROUPS or not select_native.available():
        return None
    return select_native.keep_highest(score_GM, n)


def compiled_level() -> int:
    """Return which compiled kernels run on this CPU; they may round otherwise than torch. See `cpu_level`."""
    return cpu_level()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether products of bfloat16, summed in fp32, are faster there than those of fp32."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else gram_native.available()


def multiplies(x_TI: Tensor) -> bool:
    """Say whether `add_gram` and `add_product` take these inputs: of 16 bits, multiplied as they are."""
    if x_TI.device.type == "cuda":
        return x_TI.dtype == torch.float16 or (x_TI.dtype == torch.bfloat16 and multiplies_bfloat16(x_TI.device))
    return x_TI.dtype == torch.bfloat16 and multiplies_bfloat16(x_TI.device)


def takes_batches(x: Tensor) -> bool:
    """Say whether `add_gram` is faster on many sequences at once than on one after another."""
    return x.device.type == "cuda" and multiplies(x)


def add_gram(out_II: Tensor, x_TI: Tensor, scale: float, before: float) -> None:
    """Overwrite `out_II` (fp32) with `before` times itself plus `scale` XᵀX, X of 16-bit floats, summed in fp32.

    What lies right of the diagonal's squares of 64 may stay undefined, as it mirrors the rest.
    """
    _gram(x_TI).add_gram(out_II, x_TI, scale, before)


def add_product(out_II: Tensor, x_TI: Tensor, y_TI: Tensor, scale: float, before: float) -> None:
    """Overwrite `out_II` (fp32) with `before` times itself plus `scale` XᵀY, X and Y of 16-bit floats."""
    _gram(x_TI).add_product(out_II, x_TI, y_TI, scale, before)


def _gram(x_TI: Tensor) -> ModuleType:
    return gram_native if x_TI.device.type == "cpu" else gram_cuda


def _obs(block_BO: Tensor, otherwise: ModuleType, m: int = 1) -> ModuleType:
    """Return the fastest form that takes this block, and groups of `m` columns."""
    if block_BO.device.type == "cpu":
        return obs_native if obs_native.available() else otherwise
    if block_BO.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from llmprune_kernels.obs import triton

        return triton if triton.serves(block_BO, m) and triton.runs_on(block_BO.device) else otherwise
    return otherwise
