"""The Gram matrix of a site's inputs: SparseGPT's Hessian."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.patterns import column_blocks
from llmprune.statistics.factor import Factor, FactorKind, damped, factorize, ridge
from llmprune.statistics.protocol import require_finite

_GRAM_TILE = 256  # half of a Gram matrix mirrors the other half: tiles above the diagonal are not computed
_GPU_TILE = 2048  # the same on a GPU, which small products leave idle
_MIRRORED_TILE = 64  # the least of the squares on the diagonal that all products fill, see `kernels.add_gram`
_LEAST_UNDAMPED = 0.05  # of what the damped Hessian says, for the rest to be told from it

Tile = tuple[int, int]
T = TypeVar("T")


class Gram:
    """Mean over the calibration sequences of 2 · x xᵀ summed over their tokens, kept as a running mean in fp32.

    For fp32 inputs the operations are those of SparseGPT's code, in its order, so that its masks can be met to the bit.
    Products of 16-bit inputs are exact in fp32 and are summed in whatever order is fastest.

    Args:
        inputs: how many.
        device: where the matrix is, and where matrices are solved with it.

    Attributes:
        sequences, tokens: how many were added.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._mean_II = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self._mirrored = True  # whether the tiles above the diagonal are filled in
        self._factors: dict[tuple[float, FactorKind], Factor] = {}
        self._made: dict[Hashable, Any] = {}
        self.sequences = self.tokens = 0

    @classmethod
    def from_matrix(cls, gram_II: Tensor) -> "Gram":
        """Return the statistic of inputs whose Gram matrix XᵀX [inputs, inputs], of one sequence, is known."""
        statistic = cls(len(gram_II), gram_II.device)
        statistic._mean_II += 2 * gram_II.float()
        statistic.sequences = 1
        return statistic

    @property
    def inputs(self) -> int:
        """How many inputs there are."""
        return len(self._mean_II)

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self._mean_II.device

    @staticmethod
    def tiles(x_TI: Tensor) -> list[Tile]:
        """Return the [start, stop) of the rows of each tile in which such inputs [tokens, inputs] are summed.

        A tile is what lies in its rows on and below the diagonal, as the rest mirrors it. Several processes can each sum
        some of them.
        """
        inputs = x_TI.shape[1]
        return [(0, inputs)] if kernels.multiplies(x_TI) else row_tiles(inputs)

    def parts(self, tile: Tile) -> list[Tensor]:
        """Return the sums of a tile [its rows, stop], as views."""
        start, stop = tile
        return [self._mean_II[start:stop, :stop]]

    def add(self, x_TI: Tensor, sequences: int, *, tiles: Sequence[Tile] | None = None) -> None:
        """Add the inputs [tokens, inputs] of so many calibration sequences.

        Args:
            tiles: add to these rows alone, where other processes sum the others; None is all.
        """
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
        for start, stop in row_tiles(self.inputs) if tiles is None else tiles:
            tile = self._mean_II[start:stop, :stop].mul_(self.sequences / total)
            tile.add_(x_IT[start:stop] @ x_IT[:stop].T)  # not addmm_, which would round otherwise

    def merge(self, other: "Gram") -> None:
        """Add what another statistic of the same inputs has summed."""
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
        """H = 2/n · XᵀX [inputs, inputs], X [tokens, inputs], n sequences (Frantar & Alistarh, 2023, arXiv:2301.00774)."""
        if not self._mirrored:
            for start, stop in column_blocks(self.inputs, _MIRRORED_TILE):
                self._mean_II[start:stop, stop:] = self._mean_II[stop:, start:stop].T
            self._mirrored = True
        return self._mean_II

    @property
    def norm_I(self) -> Tensor:
        """As `ColumnNorm.norm_I`, from the diagonal: a Gram serves methods that need column norms too."""
        return (self._mean_II.diagonal() / 2).sqrt()

    def factor(self, damp: float, kind: FactorKind = "inverse") -> Factor:
        """Return a triangular factor of the damped Hessian, computed once for all matrices that share this Gram.

        Args:
            damp: relative to the mean of H's diagonal; more where that does not suffice, see `Factor.damp`.
            kind: `inverse` or `root`, see `Factor`.

        Raises:
            NumericalError: the Hessian is not positive definite at any step of the damping ladder.
        """
        if (damp, kind) not in self._factors:
            others = {key: factor for key, factor in self._factors.items() if key[0] == damp}
            self._factors = others | {(damp, kind): factorize(self.hessian_II, damp, kind)}
        return self._factors[damp, kind]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returns; it is called once for all matrices that share this Gram, as long as it is kept.

        Args:
            key: tells what is made from all else that is made of this Gram.
        """
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def forget_factors(self) -> None:
        """Let go of the factors, and of what else was made once; each is as large as the Gram itself."""
        self._factors.clear()
        self._made.clear()

    def damping(self, damp: float, sampling_damp: float) -> float:
        """Return what to damp H by, relative to the mean of its diagonal: `damp` + `sampling_damp` · min(I/T, 1).

        With T tokens for I inputs the variance of what is fitted by least squares is in proportion to I/T, and so is the
        ridge that bears it best (Hoerl, Kennard & Baldwin, Communications in Statistics 4, 1975). `damp` alone where T is
        not known. What presets take was measured (eval/results/LOG.md).
        """
        return damp + sampling_damp * min(self.inputs / self.tokens, 1.0) if self.tokens else damp

    def damped_II(self, damp: float) -> Tensor:
        """Return a copy of H with `damp` x mean(diag H) on its diagonal, dead inputs as in `factorize`."""
        return damped(self.hessian_II, damp)

    def ridge(self, damp: float) -> Tensor:
        """Return what `damped_II` adds to the diagonal."""
        return ridge(self._mean_II, damp)

    def undamped(self, damped_O: Tensor, square_O: Tensor, damp: float) -> Tensor | None:
        """Return the energy of the rows d of a change, half of d H dᵀ, from what is known with damping, [outputs].

        Args:
            damped_O: d (H + λ) dᵀ of each row.
            square_O: d dᵀ of each row.
            damp: λ relative to the mean of H's diagonal.

        Returns:
            None where nearly all of it is the damping, as the difference would be mostly rounding.
        """
        energy_O = torch.addcmul(damped_O, self.ridge(damp), square_O, value=-1).clamp_min_(0)
        enough = float(torch.sub(energy_O, damped_O, alpha=_LEAST_UNDAMPED).sum()) >= 0
        return energy_O / 2 if enough else None

    def energy(self, weight_OI: Tensor) -> float:
        """Return the squared outputs of `weight_OI` on these inputs, summed over outputs and tokens, per sequence."""
        return math.fsum(_values(self.energy_O(weight_OI)))  # read at once, as a GPU stops for each answer

    def energy_O(self, weight_OI: Tensor) -> Tensor:
        """Return the energy of each row w [outputs]: half of w H wᵀ, its squared outputs per sequence; never below zero."""
        weight_OI = weight_OI.float()
        energy_O = weight_OI.new_zeros(len(weight_OI))
        tile = _GPU_TILE if self.device.type == "cuda" else _GRAM_TILE
        for start, stop in column_blocks(self.inputs, tile):  # what lies above the diagonal's squares counts twice
            here_OB = weight_OI[:, start:stop]
            with kernels.tf32(self.device):
                product_OB = (here_OB @ self.hessian_II[start:stop, start:stop]).div_(2)
                if start:
                    product_OB.addmm_(weight_OI[:, :start], self.hessian_II[:start, start:stop])
            energy_O += product_OB.mul_(here_OB).sum(1)
        return energy_O.clamp_min_(0)

    def move(self, device: torch.device) -> None:
        self._mean_II = self._mean_II.to(device)
        self.forget_factors()

    def require_finite(self, name: str) -> None:
        require_finite(self._mean_II.diagonal(), name)

    def _changed(self) -> None:
        self._mirrored = False
        self.forget_factors()


def row_tiles(inputs: int) -> list[Tile]:
    """Return the rows of the tiles in which a Gram matrix of so many inputs is summed."""
    return column_blocks(inputs, _GRAM_TILE)


def _values(sums: Tensor) -> list[float]:
    values: list[float] = sums.tolist()
    return values
