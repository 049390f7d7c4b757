"""Norms of single inputs (Wanda), and their means and variances too (DSnoT)."""

import torch
from torch import Tensor

from llmprune.statistics.protocol import require_finite


class ColumnNorm:
    """Squared L2 norm of every input over the calibration tokens, in fp32: Wanda's statistic (arXiv:2306.11695).

    Args:
        inputs: how many.
        device: where the sums are.

    Attributes:
        sum_I: squared norms [inputs].
        sequences, tokens: how many were added.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_I = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.sequences = self.tokens = 0

    @classmethod
    def from_norms(cls, norm_I: Tensor) -> "ColumnNorm":
        """Return the statistic of inputs whose norms [inputs] are known."""
        statistic = cls(len(norm_I), norm_I.device)
        statistic.sum_I += norm_I.float().square()
        statistic.sequences = 1
        return statistic

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return len(self.sum_I)

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self.sum_I.device

    def add(self, x_TI: Tensor, sequences: int) -> None:
        """Add the inputs [tokens, inputs] of so many calibration sequences."""
        self.add_squares(self.squares(x_TI), sequences, x_TI.shape[0])

    @staticmethod
    def squares(x_TI: Tensor) -> Tensor:
        """Return the squared norm of every input [inputs], which is what `add` adds."""
        x_TI = x_TI.float() if x_TI.dtype == torch.float64 else x_TI  # vector_norm widens, but does not narrow
        squares_I: Tensor = torch.linalg.vector_norm(x_TI, dim=0, dtype=torch.float32).square_()
        return squares_I

    def add_squares(self, squares_I: Tensor, sequences: int, tokens: int) -> None:
        """Add inputs of which the squared norms are known."""
        self.sum_I += squares_I
        self.sequences += sequences
        self.tokens += tokens

    def merge(self, other: "ColumnNorm") -> None:
        """Add what another statistic of the same inputs has summed."""
        self.sum_I += other.sum_I
        self.sequences += other.sequences
        self.tokens += other.tokens

    def shrink(self, other: "ColumnNorm", share: float) -> None:
        self.sum_I.mul_((1 - share) / max(self.tokens, 1)).add_(other.sum_I, alpha=share / other.tokens)
        self.sequences = 1

    @staticmethod
    def nbytes(inputs: int) -> int:
        return 4 * inputs

    @property
    def norm_I(self) -> Tensor:
        """Root of the mean over sequences of each input's squared norm, [inputs]."""
        return (self.sum_I / max(self.sequences, 1)).sqrt()

    def energy(self, weight_OI: Tensor) -> float:
        """Return the squared outputs of `weight_OI` on these inputs, summed over outputs and tokens, per sequence.

        Inputs are taken as uncorrelated: only the diagonal of their Gram matrix is known.
        """
        mean_I = self.sum_I / max(self.sequences, 1)
        return float((weight_OI.float().square() @ mean_I).sum())

    def move(self, device: torch.device) -> None:
        self.sum_I = self.sum_I.to(device)

    def require_finite(self, name: str) -> None:
        require_finite(self.sum_I, name)


class ColumnMoments(ColumnNorm):
    """The norms, and the mean and the variance of every input."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self._total_I = torch.zeros_like(self.sum_I)
        self._shrunk = False  # sums are then means per token

    def add(self, x_TI: Tensor, sequences: int) -> None:
        super().add(x_TI, sequences)
        self._total_I += x_TI.sum(0, dtype=torch.float32)

    def merge(self, other: ColumnNorm) -> None:
        super().merge(other)
        self._total_I += _moments(other)._total_I

    def shrink(self, other: ColumnNorm, share: float) -> None:
        other_I = _moments(other)._total_I
        self._total_I.mul_((1 - share) / max(self.tokens, 1)).add_(other_I, alpha=share / other.tokens)
        super().shrink(other, share)
        self._shrunk = True

    @staticmethod
    def nbytes(inputs: int) -> int:
        return 2 * ColumnNorm.nbytes(inputs)

    @property
    def mean_I(self) -> Tensor:
        """Mean over tokens of each input."""
        return self._total_I / self._count

    @property
    def variance_I(self) -> Tensor:
        """Variance over tokens of each input."""
        return (self.sum_I / self._count - self.mean_I.square()).clamp_min_(0)

    @property
    def _count(self) -> int:
        return 1 if self._shrunk else max(self.tokens, 1)


def _moments(statistic: ColumnNorm) -> ColumnMoments:
    if not isinstance(statistic, ColumnMoments):
        raise AssertionError("means cannot be had from norms alone")
    return statistic
