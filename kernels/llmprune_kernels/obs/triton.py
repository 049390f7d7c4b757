"""The recursion over one block as one Triton kernel: a tile of outputs stays in registers for all its columns.

Column by column it is the loop of `reference`, in the same order; without fused multiply-add it gives the same bits.
The columns are worked off panel by panel (an N:M group, or 8 columns where the mask is given): what a removal does to
its own panel is needed at once, what it does to the rest of the tile takes no reduction. Runs in Triton's interpreter.

Shape suffixes: B columns (inputs) of the block, O outputs. `upper_BB` is the block of the upper Cholesky factor of the
inverse Hessian. Columns are rows of the tensors, so each is contiguous.
"""

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 128  # columns whose tile fits into registers
PANEL = 8  # columns of a panel where the mask is given
ROWS = 16  # outputs of a tile

logger = logging.getLogger(__name__)


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Say whether the kernel compiles and runs there: Triton needs a C compiler, and not too old a GPU."""
    try:
        one_11 = torch.ones(1, 1, dtype=torch.float32, device=device)
        prune_masked(one_11, one_11.clone(), one_11 > 0)
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        logger.warning("no Triton kernels on %s (%s): the recursion runs in torch, slower", device, str(error)[:200])
        return False
    return True


def serves(block_BO: Tensor, m: int = 1) -> bool:
    """Say whether the kernel takes blocks of this shape and groups of `m` columns: powers of two up to 128."""
    return m & (m - 1) == 0 and len(block_BO) <= WIDEST and block_BO.stride(1) == 1


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """As `reference.obs_masked`, to the bit."""
    error_BO = block_BO.new_empty(block_BO.shape)
    _launch(block_BO, upper_BB, keep_BO.contiguous(), error_BO, fused=False)
    return error_BO


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `reference.obs_nm`, to the bit."""
    error_BO = block_BO.new_empty(block_BO.shape)
    keep_BO = block_BO.new_empty(block_BO.shape, dtype=torch.bool)
    _launch(block_BO, upper_BB, keep_BO, error_BO, n, m, fused=False)
    return error_BO, keep_BO


def prune_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """As `recursive.prune_masked`, in another order of summation."""
    _launch(block_BO, upper_BB, keep_BO.contiguous())


def prune_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """As `recursive.prune_nm`, in another order of summation."""
    keep_BO = block_BO.new_empty(block_BO.shape, dtype=torch.bool)
    _launch(block_BO, upper_BB, keep_BO, None, n, m)
    return keep_BO


def _launch(
    block_BO: Tensor,
    upper_BB: Tensor,
    keep_BO: Tensor,
    error_BO: Tensor | None = None,
    n: int = 0,
    m: int = PANEL,
    fused: bool = True,
) -> None:
    width, outputs = block_BO.shape
    with torch.cuda.device_of(block_BO):
        sweep[(triton.cdiv(outputs, ROWS),)](
            block_BO, upper_BB.contiguous(), keep_BO.view(torch.uint8), block_BO if error_BO is None else error_BO,
            outputs, width, block_BO.stride(0),
            N=n, M=m, PANELS=triton.next_power_of_2(triton.cdiv(width, m)), ROWS=ROWS, ERRORS=error_BO is not None,
            num_warps=warps(m), enable_fp_fusion=fused,
        )  # fmt: skip


def warps(m: int) -> int:
    """Return how many warps share a tile: with one, no thread waits at a barrier, but wide panels would spill."""
    return 1 if m <= 32 else m // 16


@triton.jit  # type: ignore[untyped-decorator]
def among_highest(score, N: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mark the N highest of each column of scores [M, ROWS]; among equals the lowest index goes first."""
    place = tl.arange(0, M)[:, None]
    better = tl.zeros_like(score).to(tl.int32)
    for other in range(M):
        rival = tl.sum(tl.where(place == other, score, 0.0), 0)[None, :]
        better += ((rival > score) | ((rival == score) & (other > place))).to(tl.int32)
    return better < N


@triton.jit  # type: ignore[untyped-decorator]
def sweep(  # type: ignore[no-untyped-def]
    block_ptr, upper_ptr, keep_ptr, error_ptr, outputs, width, stride,
    N: tl.constexpr, M: tl.constexpr, PANELS: tl.constexpr, ROWS: tl.constexpr, ERRORS: tl.constexpr,
):  # fmt: skip
    """Prune ROWS outputs of a block in place; N = 0 where the mask is given. All but `block` is contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    panel, place = tl.arange(0, PANELS), tl.arange(0, M)
    column = panel[:, None] * M + place[None, :]
    mine = row < outputs
    tile = tl.load(
        block_ptr + column[:, :, None] * stride + row[None, None, :],
        mask=(column < width)[:, :, None] & mine[None, None, :],
        other=0.0,
    )
    for turn in range(tl.cdiv(width, M)):
        first = turn * M
        near = first + place
        here = (near < width)[:, None] & mine[None, :]
        own = tl.sum(tl.where((panel == turn)[:, None, None], tile, 0.0), 0)
        keep_at = keep_ptr + near[:, None] * outputs + row[None, :]
        if N:
            pivots = tl.load(upper_ptr + near * (width + 1))
            keep = among_highest(tl.div_rn(own * own, (pivots * pivots)[:, None]), N, M)
            tl.store(keep_at, keep.to(tl.uint8), mask=here)
        else:
            keep = tl.load(keep_at, mask=here, other=1) != 0
        for now in range(first, min(first + M, width)):
            factors = upper_ptr + now * width
            charged = tl.sum(tl.where((near == now)[:, None] & ~keep, own, 0.0), 0)
            error = tl.div_rn(charged, tl.load(factors + now))
            own -= tl.load(factors + near, mask=(near > now) & (near < width), other=0.0)[:, None] * error[None, :]
            far = tl.load(factors + column, mask=(column >= first + M) & (column < width), other=0.0)
            tile -= far[:, :, None] * error[None, None, :]
            if ERRORS:
                tl.store(error_ptr + now * outputs + row, error, mask=mine)
        tl.store(block_ptr + near[:, None] * stride + row[None, :], tl.where(keep, own, 0.0), mask=here)
