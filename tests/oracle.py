"""Slow, plain forms of what llmprune computes, written from the papers: the truth that the tests compare with."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def sparsegpt(
    weight_OI: Tensor,
    hessian_II: Tensor,
    sparsity: float = 0.0,
    n: int = 0,
    m: int = 0,
    damp: float = 0.01,
    block: int = 128,
) -> Tensor:
    """SparseGPT as in algorithm 1 of arXiv:2301.00774, one column at a time, with three factorisations."""
    weight, hessian = weight_OI.clone().float(), hessian_II.clone()
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros_like(weight[:, start:stop])
        drop = torch.zeros_like(errors, dtype=torch.bool)
        if not m:
            score = (weight[:, start:stop] / upper.diagonal()[start:stop]) ** 2
            budget = int(weight.shape[0] * stop * sparsity) - int(weight.shape[0] * start * sparsity)
            drop.view(-1)[score.flatten().argsort(stable=True)[:budget]] = True
        for j in range(start, stop):
            if m and (j - start) % m == 0:
                score = (weight[:, j : j + m] / upper.diagonal()[j : j + m]) ** 2
                drop[:, j - start : j - start + m].scatter_(1, score.argsort(dim=1, stable=True)[:, : m - n], True)
            pruned = weight[:, j].masked_fill(drop[:, j - start], 0)
            errors[:, j - start] = (weight[:, j] - pruned) / upper[j, j]
            weight[:, j:stop] -= errors[:, j - start, None] * upper[j, j:stop]
            weight[:, j] = pruned
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def best_removal(weight_I: Tensor, hessian_II: Tensor, remove: int) -> float:
    """The smallest possible error of removing `remove` weights of one row, survivors re-fitted: all subsets tried."""
    best = float("inf")
    for dropped in itertools.combinations(range(len(weight_I)), remove):
        rows = list(dropped)
        inverse = torch.linalg.inv(hessian_II)[rows][:, rows]
        error = weight_I[rows] @ torch.linalg.solve(inverse, weight_I[rows])
        best = min(best, float(error))
    return best


def remove_lowest(score: list[float], count: int) -> list[bool]:
    """Mark the `count` lowest scores, the earliest first among equals."""
    order = sorted(range(len(score)), key=lambda index: (score[index], index))
    return [index in order[:count] for index in range(len(score))]


def best_fit(weight_I: Tensor, hessian_II: Tensor, keep_I: Tensor) -> Tensor:
    """The weights on a mask with the least error, by solving the normal equations of one row."""
    kept = keep_I.nonzero().squeeze(1)
    fitted = torch.zeros_like(weight_I)
    fitted[kept] = torch.linalg.solve(hessian_II[kept][:, kept], hessian_II[kept] @ weight_I)
    return fitted


def best_mask_error(weight_I: Tensor, hessian_II: Tensor, remove: int) -> float:
    """The smallest error of removing `remove` weights of one row, survivors unchanged: all subsets tried."""
    return min(
        float(weight_I[list(rows)] @ hessian_II[list(rows)][:, list(rows)] @ weight_I[list(rows)])
        for rows in itertools.combinations(range(len(weight_I)), remove)
    )


def can_swap(weight_I: Tensor, hessian_II: Tensor, keep_I: Tensor, group: int) -> bool:
    """Whether exchanging a kept and a removed weight of one group lowers the error of a mask, each pair tried."""

    def error(keep_I: Tensor) -> float:
        removed_I = weight_I * ~keep_I
        return float(removed_I @ hessian_II @ removed_I)

    limit = error(keep_I) * (1 - 1e-4)
    for out, back in itertools.product(range(len(weight_I)), repeat=2):
        if out // group == back // group and keep_I[out] and not keep_I[back]:
            swapped_I = keep_I.clone()
            swapped_I[out], swapped_I[back] = False, True
            if error(swapped_I) < limit:
                return True
    return False


def thanos(
    weight_OI: Tensor, hessian_II: Tensor, keep: Callable[[Tensor], Tensor], damp: float = 0.01, block: int = 64
) -> Tensor:
    """Thanos as in algorithm 1 of arXiv:2504.05346, row after row, the remaining Hessian inverted for every block.

    `keep` chooses a mask from the scores of the whole matrix.
    """
    weight, hessian = weight_OI.double(), hessian_II.double()
    norm = hessian.diagonal().sqrt()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    decided = torch.zeros_like(weight_OI)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        score = torch.where(decided != 0, decided * torch.inf, (weight.abs() * norm).float())
        drop = ~keep(score)[:, start:stop]
        decided[:, start:stop] = torch.where(drop, -1.0, 1.0)
        inverse = torch.linalg.inv(hessian[start:, start:])
        for row, dropped in zip(weight, drop, strict=True):
            q = dropped.nonzero().squeeze(1)
            row[start:] -= torch.linalg.solve(inverse[q][:, q], row[start + q]) @ inverse[q]
            row[start + q] = 0
    return weight


def dsnot(weight_I: Tensor, x_TI: Tensor, keep_I: Tensor, group: int, cycles: int, threshold: float) -> Tensor:
    """The mask of one row after the exchanges of arXiv:2310.08915, equations 4 and 5, each candidate looked at."""
    keep, inputs = keep_I.tolist(), range(len(weight_I))
    share = [float(weight_I[i] * x_TI[:, i].mean()) for i in inputs]
    score = [float(weight_I[i].abs() * x_TI[:, i].norm()) for i in inputs]
    gain = [share[i] / float(x_TI[:, i].var(correction=0)) for i in inputs]
    lost = sum(share[i] for i in inputs if not keep[i])
    enough = threshold * abs(lost)
    for _ in range(cycles):
        sign = 1 if lost > 0 else -1
        back = max((i for i in inputs if not keep[i]), key=lambda i: sign * gain[i])
        fellows = [i for i in inputs if keep[i] and i // group == back // group and sign * share[i] < 0]
        if not fellows:
            break
        out = min(fellows, key=lambda i: score[i])
        after = lost - share[back] + share[out]
        if abs(after) >= abs(lost):
            break
        keep[back], keep[out], lost = True, False, after
        if abs(lost) <= enough:
            break
    return torch.tensor(keep)


def admm(
    weight_OI: Tensor,
    hessian_II: Tensor,
    keep: Callable[[Tensor], Tensor],
    rhos: list[float],
    iterations: int,
    damp: float = 0.01,
) -> Tensor:
    """ADMM as in equation 4 of arXiv:2406.07831, V not scaled by rho, so many iterations at each rho; then equation 6.

    `keep` chooses a mask from the scores of the whole matrix; inputs are scaled to a Hessian of unit diagonal.
    """
    identity = torch.eye(len(hessian_II), dtype=torch.float64)
    hessian = hessian_II.double() + damp * hessian_II.double().diagonal().mean() * identity
    scale = hessian.diagonal().sqrt()
    hessian, dense = hessian / scale / scale[:, None], weight_OI.double() * scale
    d, v = dense * keep(dense.abs()), torch.zeros_like(dense)
    for rho in rhos:
        for _ in range(iterations):
            w = torch.linalg.solve(hessian + rho * identity, (dense @ hessian - v + rho * d).T).T
            d = (w + v / rho) * keep((w + v / rho).abs())
            v = v + rho * (w - d)
    return torch.stack([best_fit(row, hessian, kept != 0) for row, kept in zip(dense, d, strict=True)]) / scale
