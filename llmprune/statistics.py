"""What is remembered of a site's calibration inputs: column norms (Wanda), means too (DSnoT), or the Gram (SparseGPT).

Shape suffixes: T tokens, I inputs, O outputs. Sums are fp32 whatever the dtype of the inputs.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.errors import NumericalError
from llmprune.patterns import column_blocks

_GRAM_TILE = 256  # half of a Gram matrix mirrors the other half: tiles above the diagonal are not computed
_GPU_TILE = 2048  # the same on a GPU, which small products leave idle
_DAMPING_STEPS = 6  # each ten times the one before
_LEAST_DAMPING = 1e-4  # where the ladder starts to climb from if less was asked for

_log = logging.getLogger(__name__)

Tile = tuple[int, int]
FactorKind = Literal["inverse", "root"]

S = TypeVar("S", bound="Statistic")


class Statistic(Protocol):
    """A sum over calibration tokens that can be fed batch by batch."""

    sequences: int
    tokens: int

    def __init__(self, inputs: int, device: torch.device) -> None: ...

    @property
    def inputs(self) -> int:
        """Number of inputs of the matrices that it describes."""

    @property
    def device(self) -> torch.device:
        """Where it is, and where matrices are solved with it."""

    def add(self, x_TI: Tensor, sequences: int) -> None:
        """Add the inputs of `sequences` calibration sequences, flattened to [tokens, inputs]."""

    def merge(self: S, other: S) -> None:
        """Add what another statistic has summed."""

    def shrink(self: S, other: S, share: float) -> None:
        """Move the mean per token by `share` (0 to 1) of the way to that of `other`; `tokens` stays."""

    @staticmethod
    def nbytes(inputs: int) -> int:
        """Return the bytes that the statistic of that many inputs takes."""

    def energy(self, weight_OI: Tensor) -> float:
        """Return the summed square of the outputs of `weight_OI` on these inputs, per sequence."""

    def move(self, device: torch.device) -> None:
        """Go on on another device; what can be computed again is let go of."""

    def require_finite(self, name: str) -> None:
        """Raise NumericalError, naming the site, unless all sums are finite."""


class ColumnNorm:
    """Squared L2 norm of every input over the calibration tokens."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.sum_I = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.sequences = self.tokens = 0

    @classmethod
    def from_norms(cls, norm_I: Tensor) -> "ColumnNorm":
        """Return the statistic of inputs whose norms are known."""
        statistic = cls(len(norm_I), norm_I.device)
        statistic.sum_I += norm_I.float().square()
        statistic.sequences = 1
        return statistic

    @property
    def inputs(self) -> int:
        return len(self.sum_I)

    @property
    def device(self) -> torch.device:
        return self.sum_I.device

    def add(self, x_TI: Tensor, sequences: int) -> None:
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
        """Root of the mean over sequences of each input's squared norm."""
        return (self.sum_I / max(self.sequences, 1)).sqrt()

    def energy(self, weight_OI: Tensor) -> float:
        """As `Statistic.energy`, taking the inputs as uncorrelated: only the diagonal of the Gram is known."""
        mean_I = self.sum_I / max(self.sequences, 1)
        return float((weight_OI.float().square() @ mean_I).sum())

    def move(self, device: torch.device) -> None:
        self.sum_I = self.sum_I.to(device)

    def require_finite(self, name: str) -> None:
        _require_finite(self.sum_I, name)


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


class Gram:
    """Mean over the calibration sequences of 2 · x xᵀ summed over their tokens, kept as a running mean.

    In fp32 the operations are those of SparseGPT's code, in its order, so that its masks can be met to the bit. Products
    of 16-bit inputs are exact in fp32 and are summed in whatever order is fastest.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._mean_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self._mirrored = True  # whether the tiles above the diagonal are filled in
        self._factors: dict[tuple[float, FactorKind], Factor] = {}
        self.sequences = self.tokens = 0

    @classmethod
    def from_matrix(cls, gram_II: Tensor) -> "Gram":
        """Return the statistic of inputs whose Gram matrix XᵀX is known."""
        statistic = cls(len(gram_II), gram_II.device)
        statistic._mean_II += 2 * gram_II.float()
        statistic.sequences = 1
        return statistic

    @property
    def inputs(self) -> int:
        return len(self._mean_II)

    @property
    def device(self) -> torch.device:
        return self._mean_II.device

    @staticmethod
    def tiles(x_TI: Tensor) -> list[Tile]:
        """Return the rows of each tile, which is what lies in them on and below the diagonal, for such inputs."""
        inputs = x_TI.shape[1]
        return [(0, inputs)] if kernels.multiplies(x_TI) else column_blocks(inputs, _GRAM_TILE)

    def parts(self, tile: Tile) -> list[Tensor]:
        """Return the sums of a tile, as views."""
        start, stop = tile
        return [self._mean_II[start:stop, :stop]]

    def add(self, x_TI: Tensor, sequences: int, *, tiles: Sequence[Tile] | None = None) -> None:
        """As `Statistic.add`; with `tiles` to these alone, where the others are summed elsewhere."""
        total = self.sequences + sequences
        if tiles != []:
            self._add(x_TI, total, tiles)
        self._changed()
        self.sequences = total
        self.tokens += x_TI.shape[0]

    def _add(self, x_TI: Tensor, total: int, tiles: Sequence[Tile] | None) -> None:
        if kernels.multiplies(x_TI):
            kernels.add_gram(self._mean_II, x_TI, 2 / total, self.sequences / total)
            return
        x_IT = x_TI.float().T * math.sqrt(2 / total)
        for start, stop in column_blocks(self.inputs, _GRAM_TILE) if tiles is None else tiles:
            tile = self._mean_II[start:stop, :stop].mul_(self.sequences / total)
            tile.add_(x_IT[start:stop] @ x_IT[:stop].T)  # not addmm_, which would round otherwise

    def merge(self, other: "Gram") -> None:
        total = max(self.sequences + other.sequences, 1)
        self._mean_II.mul_(self.sequences / total).add_(other._mean_II, alpha=other.sequences / total)
        self._changed()
        self.sequences += other.sequences
        self.tokens += other.tokens

    def shrink(self, other: "Gram", share: float) -> None:
        own = (1 - share) * self.sequences / max(self.tokens, 1)
        self._mean_II.mul_(own).add_(other._mean_II, alpha=share * other.sequences / other.tokens)
        self._changed()
        self.sequences = 1

    @staticmethod
    def nbytes(inputs: int) -> int:
        return 4 * inputs * inputs

    @property
    def hessian_II(self) -> Tensor:
        """H = 2/n · X Xᵀ with n the number of sequences (Frantar & Alistarh, 2023, arXiv:2301.00774)."""
        if not self._mirrored:
            for start, stop in column_blocks(self.inputs, _GRAM_TILE):
                self._mean_II[start:stop, stop:] = self._mean_II[stop:, start:stop].T
            self._mirrored = True
        return self._mean_II

    @property
    def norm_I(self) -> Tensor:
        """As `ColumnNorm.norm_I`, from the diagonal: a Gram serves methods that need column norms too."""
        return (self._mean_II.diagonal() / 2).sqrt()

    def factor(self, damp: float, kind: FactorKind = "inverse") -> "Factor":
        """Return a factor of the damped Hessian; sites that share this Gram share the work.

        Raises:
            NumericalError: the Hessian is not positive definite at any step of the damping ladder.
        """
        if (damp, kind) not in self._factors:
            others = {key: factor for key, factor in self._factors.items() if key[0] == damp}
            self._factors = others | {(damp, kind): factorize(self.hessian_II, damp, kind)}
        return self._factors[damp, kind]

    def forget_factors(self) -> None:
        """Let go of the factors, which are as large as the Gram itself."""
        self._factors.clear()

    def damped_II(self, damp: float) -> Tensor:
        """Return a copy of H with `damp` x mean(diag H) on its diagonal, dead inputs as in `factorize`."""
        return _damped(self.hessian_II, damp)

    def energy(self, weight_OI: Tensor) -> float:
        weight_OI, parts = weight_OI.float(), list[Tensor]()
        tile = _GPU_TILE if self.device.type == "cuda" else _GRAM_TILE
        for start, stop in column_blocks(self.inputs, tile):  # what lies above the diagonal counts twice
            product = (weight_OI[:, start:stop] @ self.hessian_II[start:stop, :stop]).mul_(weight_OI[:, :stop])
            parts += [product[:, :start].sum(), product[:, start:].sum() / 2]
        return math.fsum(_values(torch.stack(parts)))  # read at once, as a GPU stops for each answer

    def move(self, device: torch.device) -> None:
        self._mean_II = self._mean_II.to(device)
        self.forget_factors()

    def require_finite(self, name: str) -> None:
        _require_finite(self._mean_II.diagonal(), name)

    def _changed(self) -> None:
        self._mirrored = False
        self._factors.clear()


class CrossGram(Gram):
    """A Gram matrix that also relates the inputs P to those that the dense model has in their place, D.

    With a target between the two models' outputs, `share`·D Wᵀ + (1-share)·P Wᵀ, the least squares problem over the
    pruned weights is that of other weights W*, to which every solver applies unchanged; compare GPTAQ (Li et al., 2025,
    arXiv:2504.02692), which quantizes towards the dense model's outputs in the same way.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self._cross_II: Tensor | None = None
        self._mixture: tuple[float, Tensor] | None = None

    def parts(self, tile: Tile) -> list[Tensor]:
        cross = [] if self._cross_II is None else [self._cross_II[slice(*tile)]]
        return [*super().parts(tile), *cross]

    def add(
        self,
        x_TI: Tensor,
        sequences: int,
        dense_TI: Tensor | None = None,
        *,
        tiles: Sequence[Tile] | None = None,
    ) -> None:
        """As `Gram.add`, and the dense model's inputs [tokens, inputs], for all of the sequences or for none."""
        if dense_TI is not None:
            if self._cross_II is None:
                self._cross_II = torch.zeros_like(self._mean_II)
            self._mixture = None
            if tiles != []:
                self._add_cross(self._cross_II, x_TI, dense_TI, self.sequences + sequences, tiles)
        super().add(x_TI, sequences, tiles=tiles)

    def _add_cross(
        self, cross_II: Tensor, x_TI: Tensor, dense_TI: Tensor, total: int, tiles: Sequence[Tile] | None
    ) -> None:
        scale, before = 2 / total, self.sequences / total
        if kernels.multiplies(x_TI):
            kernels.add_product(cross_II, dense_TI, x_TI, scale, before)
            return
        x_TI, dense_IT = x_TI.float(), dense_TI.float().T
        for start, stop in column_blocks(self.inputs, _GRAM_TILE) if tiles is None else tiles:
            cross_II[start:stop].addmm_(dense_IT[start:stop], x_TI, beta=before, alpha=scale)

    def move(self, device: torch.device) -> None:
        super().move(device)
        if self._cross_II is not None:
            self._cross_II = self._cross_II.to(device)

    @staticmethod
    def nbytes(inputs: int) -> int:
        return 2 * Gram.nbytes(inputs)

    def target(self, weight_OI: Tensor, share: float, damp: float) -> Tensor:
        """Return W* = (W C + λW)(H + λ)⁻¹ in fp32, C = `share`·DᵀP + (1-share)·PᵀP; W where D was not seen.

        Args:
            weight_OI: the dense weights.
            share: of the target that is the dense model's output, 0 to 1.
            damp: λ relative to the mean of H's diagonal.
        """
        weight_OI = weight_OI.float()
        if self._cross_II is None or not share:
            return weight_OI
        factor = self.factor(damp, "root")
        ridge = factor.damp * self.hessian_II.diagonal().masked_fill(factor.dead_I, 1).mean()
        goal_OI = torch.addmm(weight_OI * ridge, weight_OI, self._mixed(self._cross_II, share))
        half_OI = torch.linalg.solve_triangular(factor.upper_II.T, goal_OI, upper=False, left=False)  # H = R Rᵀ
        target_OI: Tensor = torch.linalg.solve_triangular(factor.upper_II, half_OI, upper=True, left=False)
        return target_OI

    def _mixed(self, cross_II: Tensor, share: float) -> Tensor:
        """Return C = `share`·DᵀP + (1-share)·PᵀP, once for all sites that read these inputs."""
        if self._mixture is None or self._mixture[0] != share:
            self._mixture = share, torch.lerp(self.hessian_II, cross_II, share)
        return self._mixture[1]


class Gradient:
    """What a backward pass of the dense model tells of a matrix W, of y = W x, over sequences of tokens.

    Attributes:
        square_O: sum over tokens of (dL/dy)², one for each output.
        square_OI: sum over sequences of (dL/dW)², each of them the gradient of that sequence's loss; None unless asked
            for, as it is as large as W.
        sequences, tokens: how many were seen; of an expert, those that were routed to it.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device, of_weights: bool = True) -> None:
        self.inputs = inputs
        self.square_O = torch.zeros(outputs, dtype=torch.float32, device=device)
        self.square_OI = torch.zeros(outputs, inputs, dtype=torch.float32, device=device) if of_weights else None
        self._sequence_OI = torch.zeros_like(self.square_OI) if self.square_OI is not None else None
        self.sequences = self.tokens = 0

    @classmethod
    def from_gradient(cls, gradient_OI: Tensor) -> "Gradient":
        """Return the statistic of weights whose gradient over one sequence is known."""
        outputs, inputs = gradient_OI.shape
        statistic = cls(outputs, inputs, gradient_OI.device)
        statistic.square_OI = gradient_OI.float().square()
        statistic.sequences = statistic.tokens = 1
        return statistic

    @property
    def device(self) -> torch.device:
        return self.square_O.device

    def add(self, x_TI: Tensor, g_TO: Tensor) -> None:
        """Add inputs and the gradients of the outputs for tokens of one sequence."""
        g_TO = g_TO.float()
        self.square_O += g_TO.square().sum(0)
        self.tokens += len(g_TO)
        if self._sequence_OI is not None:
            self._sequence_OI.addmm_(g_TO.T, x_TI.float())

    def close_sequence(self) -> None:
        """Say that all of a sequence has been added."""
        self.sequences += 1
        if self.square_OI is not None and self._sequence_OI is not None:
            self.square_OI.addcmul_(self._sequence_OI, self._sequence_OI)
            self._sequence_OI.zero_()

    def energy(self, weight_OI: Tensor) -> float:
        """Return Σ (w · dL/dW)² over the weights and sequences: what a change of the weights does to first order."""
        assert self.square_OI is not None
        return float((weight_OI.float().square() * self.square_OI).sum())

    def require_finite(self, name: str) -> None:
        """Raise NumericalError, naming the site, unless all sums are finite."""
        sums = [self.square_O] if self.square_OI is None else [self.square_O, self.square_OI]
        if not all(bool(torch.isfinite(part).all()) for part in sums):
            raise NumericalError(f"{name}: its gradients hold NaN or infinity; run with --dtype bfloat16 or float32")


@dataclass(frozen=True)
class Factor:
    """An upper triangular factor of the damped Hessian.

    Of kind `inverse` it is U with H⁻¹ = Uᵀ U, computed as the paper's code does; of kind `root` it is R with
    H = R Rᵀ. They are one factor, U = R⁻¹, but R needs a quarter of the work and no inverse.
    """

    upper_II: Tensor
    dead_I: Tensor
    damp: float
    notes: tuple[str, ...] = field(default=())


def factorize(hessian_II: Tensor, damp: float, kind: FactorKind = "inverse") -> Factor:
    """Factor H with `damp` x mean(diag H) added to its diagonal.

    Inputs that are always zero get a one on the diagonal, before the damping, as in the paper's code. When the
    matrix is not positive definite in fp32 the damping grows tenfold, and a note says so.

    Raises:
        NumericalError: no step of the ladder helps.
    """
    notes: list[str] = []
    for step in range(_DAMPING_STEPS):
        tried = max(damp, _LEAST_DAMPING) * 10**step if step else damp
        upper_II = _DECOMPOSITIONS[kind](_damped(hessian_II, tried))
        if upper_II is not None:
            return Factor(upper_II, hessian_II.diagonal() == 0, tried, tuple(notes))
        raised = max(damp, _LEAST_DAMPING) * 10 ** (step + 1)
        notes.append(f"not positive definite at damping {tried:g}, raised to {raised:g}")
        _log.warning("Gram matrix of %d inputs: %s", len(hessian_II), notes[-1])
    raise NumericalError(f"the Gram matrix is not positive definite even at damping {tried:g}: use more calibration")


def _damped(hessian_II: Tensor, damp: float) -> Tensor:
    diagonal_I = hessian_II.diagonal().masked_fill(hessian_II.diagonal() == 0, 1)
    damped_II = hessian_II.clone()
    damped_II.diagonal().copy_(diagonal_I + damp * diagonal_I.mean())
    return damped_II


def _root_factor(damped_II: Tensor) -> Tensor | None:
    """Return R with H = R Rᵀ, or None if H is not positive definite: with J the reversal, J H J = L Lᵀ, R = J L J."""
    lower_II, failed = torch.linalg.cholesky_ex(damped_II.flip(0, 1))
    healthy = not failed.item() and math.isfinite(float(lower_II.diagonal().sum()))
    return lower_II.flip(0, 1) if healthy else None


def _inverse_factor(damped_II: Tensor) -> Tensor | None:
    """Return U with H⁻¹ = Uᵀ U, or None if H or its inverse is not positive definite in fp32; overwrites H."""
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if failed.item():
        return None
    torch.cholesky_inverse(lower_II, out=damped_II)
    upper_II, failed = torch.linalg.cholesky_ex(damped_II, upper=True)
    healthy = not failed.item() and math.isfinite(float(upper_II.diagonal().sum()))
    return upper_II if healthy else None


_DECOMPOSITIONS: dict[FactorKind, Callable[[Tensor], Tensor | None]] = {
    "inverse": _inverse_factor,
    "root": _root_factor,
}


def _values(sums: Tensor) -> list[float]:
    values: list[float] = sums.tolist()
    return values


def _require_finite(sums: Tensor, name: str) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise NumericalError(
            f"{name}: its calibration inputs hold NaN or infinity; where float16 overflows run with --dtype bfloat16 "
            "or float32, else check the checkpoint"
        )
