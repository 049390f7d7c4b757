"""What is remembered of a site's calibration inputs: column norms (Wanda) or the Gram matrix (SparseGPT).

Shape suffixes: T tokens, I inputs, O outputs. Sums are fp32 whatever the dtype of the inputs.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llmprune.errors import NumericalError

_GRAM_TILE = 512  # half of a Gram matrix mirrors the other half: tiles above the diagonal are not computed
_DAMPING_STEPS = 6  # each ten times the one before
_ROW_CHUNK = 1 << 24  # elements of a weight matrix that are held in fp32 at once while its energy is summed

S = TypeVar("S", bound="Statistic")


class Statistic(Protocol):
    """A sum over calibration tokens that can be fed batch by batch."""

    sequences: int
    tokens: int

    def __init__(self, inputs: int, device: torch.device) -> None: ...

    def add(self, x_TI: Tensor, sequences: int) -> None:
        """Add the inputs of `sequences` calibration sequences, flattened to [tokens, inputs]."""

    def merge(self: S, other: S) -> None:
        """Add what another statistic has summed."""

    def energy(self, weight_OI: Tensor) -> float:
        """Return the summed square of the outputs of `weight_OI` on these inputs, per sequence."""

    def require_finite(self, name: str) -> None:
        """Raise NumericalError, naming the site, unless all sums are finite."""


class ColumnNorm:
    """Squared L2 norm of every input over the calibration tokens."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_I = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.sequences = self.tokens = 0

    def add(self, x_TI: Tensor, sequences: int) -> None:
        self.sum_I += torch.linalg.vector_norm(x_TI, dim=0, dtype=torch.float32).square_()
        self.sequences += sequences
        self.tokens += x_TI.shape[0]

    def merge(self, other: "ColumnNorm") -> None:
        self.sum_I += other.sum_I
        self.sequences += other.sequences
        self.tokens += other.tokens

    @property
    def norm_I(self) -> Tensor:
        """Root of the mean over sequences of each input's squared norm."""
        return (self.sum_I / max(self.sequences, 1)).sqrt()

    def energy(self, weight_OI: Tensor) -> float:
        """As `Statistic.energy`, taking the inputs as uncorrelated: only the diagonal of the Gram is known."""
        mean_I = self.sum_I / max(self.sequences, 1)
        return sum(float((rows.float().square() @ mean_I).sum()) for rows in _row_chunks(weight_OI))

    def require_finite(self, name: str) -> None:
        _require_finite(self.sum_I, name)


class Gram:
    """Sum of x xᵀ over the calibration tokens."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._lower_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self._factors: dict[float, Factor] = {}
        self.sequences = self.tokens = 0

    def add(self, x_TI: Tensor, sequences: int) -> None:
        x_TI = x_TI.float()
        for start in range(0, x_TI.shape[1], _GRAM_TILE):  # tiles on and below the diagonal
            stop = start + _GRAM_TILE
            self._lower_II[start:stop, :stop].addmm_(x_TI[:, start:stop].T, x_TI[:, :stop])
        self._factors.clear()
        self.sequences += sequences
        self.tokens += x_TI.shape[0]

    def merge(self, other: "Gram") -> None:
        self._lower_II += other._lower_II
        self._factors.clear()
        self.sequences += other.sequences
        self.tokens += other.tokens

    @property
    def hessian_II(self) -> Tensor:
        """H = 2/n · X Xᵀ with n the number of sequences (Frantar & Alistarh, 2023, arXiv:2301.00774)."""
        hessian_II = self._lower_II * (2 / max(self.sequences, 1))
        mirrored_II = hessian_II.tril(-1).T
        return hessian_II.tril_().add_(mirrored_II)

    def factor(self, damp: float) -> "Factor":
        """Return the factor of the damped Hessian; sites that share this Gram share the work.

        Raises:
            NumericalError: the Hessian is not positive definite at any step of the damping ladder.
        """
        if damp not in self._factors:
            self._factors = {damp: factorize(self.hessian_II, damp)}
        return self._factors[damp]

    def energy(self, weight_OI: Tensor) -> float:
        gram_II = self.hessian_II.div_(2)
        return sum(float((rows.float() @ gram_II).mul_(rows).sum()) for rows in _row_chunks(weight_OI))

    def require_finite(self, name: str) -> None:
        _require_finite(self._lower_II.diagonal(), name)


@dataclass(frozen=True)
class Factor:
    """H + damping = R Rᵀ with R upper triangular.

    The inverse U = R⁻¹ is the upper Cholesky factor of H⁻¹ that SparseGPT's recursion uses: with J the reversal of
    rows and columns, J H J = L Lᵀ gives R = J L J, so one factorisation does the work of three and no inverse of
    full size is formed.
    """

    upper_II: Tensor
    dead_I: Tensor
    damp: float
    notes: tuple[str, ...] = field(default=())


def factorize(hessian_II: Tensor, damp: float) -> Factor:
    """Factor H with `damp` x mean(diag H) added to its diagonal; overwrites `hessian_II`.

    Inputs that are always zero get a one on the diagonal, before the damping, as in the paper's code. When the
    matrix is not positive definite in fp32 the damping grows tenfold, and a note says so.
    """
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1
    mean, added = float(diagonal_I.mean()), 0.0
    notes: list[str] = []
    for step in range(_DAMPING_STEPS):
        tried = damp * 10**step
        diagonal_I += tried * mean - added
        added = tried * mean
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II.flip(0, 1))
        if not failed.item() and math.isfinite(float(lower_II.diagonal().sum())):
            return Factor(lower_II.flip(0, 1), dead_I, tried, tuple(notes))
        notes.append(f"not positive definite at damping {tried:g}, raised to {tried * 10:g}")
    raise NumericalError(f"the Gram matrix is not positive definite even at damping {tried:g}: use more calibration")


def _row_chunks(weight_OI: Tensor) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = weight_OI.split(max(1, _ROW_CHUNK // weight_OI.shape[1]))
    return chunks


def _require_finite(sums: Tensor, name: str) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or infinity; check the checkpoint, or run with --dtype float32"
        )
