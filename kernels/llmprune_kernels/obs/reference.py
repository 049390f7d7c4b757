"""The recursion in plain torch (Frantar & Alistarh, 2023, arXiv:2301.00774, algorithm 1, inner loop).

Shape suffixes: B columns (inputs) of the block, O outputs, M columns of an N:M group. `upper_BB` is the block of
the upper Cholesky factor of the inverse Hessian. Columns are rows of the tensors, so each is contiguous.

Errors of a few columns are carried to the rest of the block by one matrix product; within those few, column by
column. The arithmetic is that of the plain loop, with an eighth of its memory traffic.
"""

import torch
from torch import Tensor

_PANEL = 16  # columns between two matrix products


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """Remove what `keep_BO` does not keep, compensating to the right; overwrites `block_BO` with the result."""
    for start in range(0, len(block_BO), _PANEL):
        _sweep_panel(block_BO, upper_BB, keep_BO, start, min(start + _PANEL, len(block_BO)))
    block_BO.masked_fill_(~keep_BO, 0)


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """As `obs_masked`, keeping `n` of every `m` columns, chosen when their turn comes; returns the mask."""
    keep_BO = torch.empty_like(block_BO, dtype=torch.bool)
    for start, stop in _nm_panels(len(block_BO), m):
        _sweep_panel(block_BO, upper_BB, keep_BO, start, stop, (n, m))
    block_BO.masked_fill_(~keep_BO, 0)
    return keep_BO


def _nm_panels(columns: int, m: int) -> list[tuple[int, int]]:
    """Cut the block so that every group begins where all errors from its left have arrived."""
    whole_groups = max(_PANEL // m * m, m)  # several small groups in a panel, or several panels in a large group
    return [
        (panel, min(panel + (whole_groups if m <= _PANEL else _PANEL), group + whole_groups))
        for group in range(0, columns, whole_groups)
        for panel in range(group, min(group + whole_groups, columns), whole_groups if m <= _PANEL else _PANEL)
    ]


def _sweep_panel(
    block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor, start: int, stop: int, nm: tuple[int, int] | None = None
) -> None:
    panel_PO, upper_PP = block_BO[start:stop], upper_BB[start:stop, start:stop]
    error_PO = torch.empty_like(panel_PO)
    for column, inverse in enumerate((1 / upper_PP.diagonal()).tolist()):
        if nm and (start + column) % nm[1] == 0:
            _choose_group(block_BO, upper_BB, keep_BO, slice(start + column, start + column + nm[1]), nm[0])
        torch.mul(panel_PO[column], inverse, out=error_PO[column])
        error_PO[column].masked_fill_(keep_BO[start + column], 0)
        panel_PO[column + 1 :].addr_(upper_PP[column, column + 1 :], error_PO[column], alpha=-1)
    block_BO[stop:].addmm_(upper_BB[start:stop, stop:].T, error_PO, alpha=-1)


def _choose_group(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor, group: slice, n: int) -> None:
    """Keep the `n` costliest columns of a group, per output; among equals the lowest index goes first."""
    score_MO = (block_BO[group] / upper_BB.diagonal()[group].unsqueeze(1)).square_()
    order_MO = score_MO.argsort(dim=0, stable=True)
    keep_BO[group] = torch.zeros_like(score_MO, dtype=torch.bool).scatter_(0, order_MO[len(order_MO) - n :], True)
