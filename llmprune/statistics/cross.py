"""The Gram matrix of the pruned model's inputs, and their products with the dense model's in their place.

It serves targets between the outputs of both models.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.statistics.factor import Factor
from llmprune.statistics.gram import Gram, Tile, row_tiles
from llmprune.statistics.protocol import require_finite

DenseTarget = float | Literal["auto"]  # the dense model's share of a target, or by how well the inputs are known

_AUTO_MOST = 0.7
_AUTO_TOKENS = 8  # for each input, at which half of that is taken


class CrossGram(Gram):
    """A Gram matrix that also relates the inputs P to those that the dense model has in their place, D.

    With a target between the two models' outputs, `share`·D Wᵀ + (1-share)·P Wᵀ, the least squares problem over the
    pruned weights is that of other weights W*, to which every solver applies unchanged; compare GPTAQ (Li et al., 2025,
    arXiv:2504.02692), which quantizes towards the dense model's outputs in the same way.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        super().__init__(inputs, device)
        self._cross_II: Tensor | None = None

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
        for start, stop in row_tiles(self.inputs) if tiles is None else tiles:
            cross_II[start:stop].addmm_(dense_IT[start:stop], x_TI, beta=before, alpha=scale)

    def move(self, device: torch.device) -> None:
        super().move(device)
        if self._cross_II is not None:
            self._cross_II = self._cross_II.to(device)

    @staticmethod
    def nbytes(inputs: int) -> int:
        return 2 * Gram.nbytes(inputs)

    def share(self, dense_target: DenseTarget) -> float:
        """Return the share of the dense model's outputs; `auto` is 0.7 T / (T + 8 n) of T tokens and n inputs.

        What takes the pruned model's inputs to the dense one's outputs is a regression on n inputs: the fewer tokens
        there are for each, the more of it is noise. Both numbers are measured (eval/results/LOG.md).
        """
        if dense_target == "auto":
            return _AUTO_MOST * self.tokens / max(self.tokens + _AUTO_TOKENS * self.inputs, 1)
        return dense_target

    def require_finite(self, name: str) -> None:
        super().require_finite(name)
        if self._cross_II is not None:
            require_finite(self._cross_II.sum(1), f"the dense model's part of {name}")

    def target(self, weight_OI: Tensor, dense_target: DenseTarget, damp: float) -> Tensor:
        """Return W* = (W C + λW)(H + λ)⁻¹ in fp32, C = a·DᵀP + (1-a)·PᵀP; W where D was not seen.

        Args:
            weight_OI: the dense weights.
            dense_target: a, the share of the target that is the dense model's output, 0 to 1, or `auto`; see `share`.
            damp: λ relative to the mean of H's diagonal.
        """
        weight_OI, share = weight_OI.float(), self.share(dense_target)
        if self._cross_II is None or not share:
            return weight_OI
        factor = self.factor(damp, "root")
        if self.device.type == "cuda":
            return weight_OI + self._corrections(weight_OI, self._cross_II, share, factor)
        goal_OI = torch.addmm(weight_OI * self.ridge(factor.damp), weight_OI, self._mixed(self._cross_II, share))
        return _divided(goal_OI, factor)

    def _mixed(self, cross_II: Tensor, share: float) -> Tensor:
        """Return C = `share`·DᵀP + (1-share)·PᵀP, once for all sites that read these inputs."""
        return self.once(("mixture", share), lambda: torch.lerp(self.hessian_II, cross_II, share))

    def _corrections(self, weight_OI: Tensor, cross_II: Tensor, share: float, factor: Factor) -> Tensor:
        """Return W* - W = W (C - H)(H + λ)⁻¹: small, so that its products bear TF32, but those of W* would not.

        Matrices with more rows than inputs share what they are multiplied with; for the others that is more work.
        """

        def shift_II() -> Tensor:
            return torch.sub(cross_II, self.hessian_II).mul_(share)

        if len(weight_OI) < self.inputs:
            with kernels.tf32(self.device):
                goal_OI = weight_OI @ self.once(("shift", share), shift_II)
            return _divided(goal_OI, factor)
        matrix_II = self.once(("correction", share, factor.damp), lambda: _divided(shift_II(), factor))
        with kernels.tf32(self.device):
            return weight_OI @ matrix_II


def _divided(x_OI: Tensor, factor: Factor) -> Tensor:
    """Return X (R Rᵀ)⁻¹."""
    half_OI = torch.linalg.solve_triangular(factor.upper_II.T, x_OI, upper=False, left=False)
    whole_OI: Tensor = torch.linalg.solve_triangular(factor.upper_II, half_OI, upper=True, left=False)
    return whole_OI
