"""Costs from what `llmprune sensitivity` has measured: each block, and each kind of matrix, pruned by itself.

Its file tells sums of costs: of all matrices of a block, and of all matrices of a kind. The cost of each matrix is
taken to be the one that has these sums and is otherwise in proportion to its weights, which iterative proportional
fitting finds (Deming & Stephan, Annals of Mathematical Statistics 11(4), 1940). Both sums are of the same matrices, so
they would agree if costs added up; as they do not quite, those of the kinds are scaled to the total of the blocks.

Shape suffixes: B blocks, K kinds, P points of a curve.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmprune.allocation.shares import Curve, Floats
from llmprune.errors import RecipeError

_ROUNDS = 50  # of fitting; where all blocks have the same shapes the first one is exact
_LEAST = 1e-12  # nats a token; a measured divergence can be zero


def kind_of(name: str) -> str:
    """Return the part that a site plays in its block, such as `q_proj`, by its name."""
    parts = [part for part in name.partition("[")[0].split(".") if part != "weight" and not part.isdigit()]
    return parts[-1]


@dataclass(frozen=True)
class Part:
    """Where a site belongs: the number of its block, as text, its kind such as `q_proj`, and its weights."""

    block: str
    kind: str
    weights: int


@dataclass(frozen=True)
class Measured:
    """The contents of a `sensitivity.json`.

    Attributes:
        path: of the file.
        model: the name of the model that was measured.
        shares: the sparsities that were measured, rising.
        blocks, kinds: KL divergence in nats a token at each of the shares, by part.
    """

    path: str
    model: str
    shares: tuple[float, ...]
    blocks: dict[str, tuple[float, ...]]
    kinds: dict[str, tuple[float, ...]]

    @classmethod
    def read(cls, path: str) -> "Measured":
        """Read a file.

        Raises:
            RecipeError: it cannot be read, is of another kind, or measures fewer than two sparsities.
        """
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            curves = _curves(found["cells"])
            model = str(found["settings"]["model"])
            shares = tuple(sorted({share for curve in curves.values() for share in curve}))
            parts = {key: tuple(max(curve[share], _LEAST) for share in shares) for key, curve in curves.items()}
        except OSError as error:
            raise RecipeError(f"allocation {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RecipeError(
                f"allocation {path} is not what `llmprune sensitivity --out FOLDER` writes: give its sensitivity.json"
            ) from None
        if len(shares) < 2:
            raise RecipeError(
                f"allocation {path} has no curves, as fewer than two sparsities were measured: measure again with "
                "--sparsities 0.3,0.5,0.7 or the like"
            )
        blocks, kinds = (
            {part: costs for (axis, part), costs in parts.items() if axis == which} for which in ("block", "kind")
        )
        return cls(path, model, shares, blocks, kinds)

    def require_fit(self, parts: Iterable[Part]) -> None:
        """Raise RecipeError unless these are the blocks and kinds that were measured, no more and no fewer."""
        parts = list(parts)
        for what, measured, here in (
            ("block", self.blocks, {part.block for part in parts}),
            ("kind", self.kinds, {part.kind for part in parts}),
        ):
            if other := sorted(here ^ measured.keys()):
                owner, lacking = ("the model", "the file") if other[0] in here else ("the file", "the model")
                raise RecipeError(
                    f"allocation {self.path} was measured on another model, {self.model}: {owner} has {what} "
                    f"{other[0]}, {lacking} does not; run `llmprune sensitivity` on this one"
                )

    def costs(self, parts: Mapping[str, Part]) -> dict[str, Curve]:
        """Return the cost of each site by its name; `parts` are all the sites that were measured together."""
        row, column = ({name: index for index, name in enumerate(names)} for names in (self.blocks, self.kinds))
        weights_BK = np.zeros((len(row), len(column)))
        for part in parts.values():
            weights_BK[row[part.block], column[part.kind]] += part.weights
        block_BP, kind_KP = (np.array(list(curves.values())) for curves in (self.blocks, self.kinds))
        each_PBK = np.stack(
            [_fitted(weights_BK, block_B, kind_K) for block_B, kind_K in zip(block_BP.T, kind_KP.T, strict=True)]
        )
        found = {}
        for name, part in parts.items():
            block, kind = row[part.block], column[part.kind]
            cost_P = each_PBK[:, block, kind] * part.weights / weights_BK[block, kind]
            found[name] = Curve(self.shares, tuple(cost_P.tolist()))
        return found


def _curves(cells: Any) -> dict[tuple[str, str], dict[float, float]]:
    """Return KL divergences by axis and part, then by sparsity; ValueError and the like for what is none."""
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for cell in cells:
        share, divergence = float(cell["sparsity"]), float(cell["kl_divergence"])
        if cell["axis"] not in ("block", "kind") or not 0 < share < 1 or not math.isfinite(divergence):
            raise ValueError(cell)
        curves.setdefault((cell["axis"], str(cell["part"])), {})[share] = divergence
    if {axis for axis, _ in curves} != {"block", "kind"}:
        raise ValueError("one of the axes is missing")
    return curves


def _fitted(weights_BK: Floats, block_B: Floats, kind_K: Floats) -> Floats:
    """Return costs that sum up to those of the blocks, and of the kinds up to one factor, as weights let them."""
    kind_K = kind_K * (block_B.sum() / kind_K.sum())
    cost_BK = weights_BK
    for _ in range(_ROUNDS):
        cost_BK = cost_BK * (kind_K / cost_BK.sum(0))
        cost_BK = cost_BK * (block_B / cost_BK.sum(1))[:, None]
    return cost_BK
