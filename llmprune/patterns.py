"""Which weights of a matrix may stay: unstructured sparsity and N:M.

Shape suffixes: O outputs, I inputs, B inputs of a block of columns, R rows of a part. `keep` is boolean, True stays.
N:M always means N kept of every M consecutive inputs; some tools mean N removed.

A comparison group is the set of weights that compete for the same budget: `row` (one output), `layer` (the whole
matrix), `block` (128 input columns, all outputs) or `model` (all matrices together).
"""

import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from llmprune.errors import PatternError
from llmprune.selection import highest, lowest, lowest_of_rows

ComparisonGroup = Literal["row", "layer", "block", "model"]
COMPARISON_GROUPS: tuple[ComparisonGroup, ...] = get_args(ComparisonGroup)
BLOCK_COLUMNS = 128

_LEVELS = 8  # of a row's scale, between one power of two and the next
_LEVEL_OF_ONE = 128  # the byte that stands for a scale of 1
_MOST_LEVELS = 24  # up or down: scales from an eighth to eight


def as_row_levels(octave_O: Tensor) -> bytes:
    """Return row scales, given as logarithms to base two, in the form of `Count.row_levels`; none where all are 1."""
    level_O = octave_O.mul(_LEVELS).round().clamp(-_MOST_LEVELS, _MOST_LEVELS)
    return bytes(level_O.add(_LEVEL_OF_ONE).byte().tolist()) if level_O.any() else b""


class Pattern(Protocol):
    """What every pattern can do."""

    @property
    def sparsity(self) -> float:
        """The fraction of weights to remove."""

    @property
    def row_wise(self) -> bool:
        """Whether each row of a mask depends on the scores of that row only."""

    def misfit(self, rows: int, columns: int) -> str | None:
        """Say why a matrix of this shape cannot hold the pattern, or return None."""

    def keep(self, score_OI: Tensor) -> Tensor:
        """Return the mask that keeps the highest scores: exactly as many as the pattern asks for.

        Among equal scores the ones with the lowest index are removed first.
        """

    def keep_block(self, score_OB: Tensor, start: int) -> Tensor:
        """Return the mask of one block of columns, which begins at column `start` of the matrix.

        The masks of blocks that make up the matrix are together exactly what the pattern asks for.
        """

    def check(self, keep_OI: Tensor) -> None:
        """Raise PatternError unless the mask satisfies the pattern exactly."""


@dataclass(frozen=True)
class Unstructured:
    """Remove `int(count * sparsity)` weights of every comparison group, wherever they are."""

    sparsity: float
    group: ComparisonGroup = "layer"

    @property
    def row_wise(self) -> bool:
        return self.group == "row"

    def misfit(self, rows: int, columns: int) -> str | None:
        return None

    def block_budget(self, rows: int, start: int, stop: int) -> int:
        """Return how many weights to remove in columns [start, stop) so that the running total is exact."""
        return int(rows * stop * self.sparsity) - int(rows * start * self.sparsity)

    def keep(self, score_OI: Tensor) -> Tensor:
        rows, columns = score_OI.shape
        if self.group == "row":
            return ~lowest(score_OI, int(columns * self.sparsity))
        if self.group == "block":
            return torch.cat([self.keep_block(score_OI[:, s:e], s) for s, e in column_blocks(columns)], dim=1)
        return ~lowest(score_OI.reshape(1, -1), int(rows * columns * self.sparsity)).view(rows, columns)

    def keep_block(self, score_OB: Tensor, start: int) -> Tensor:
        rows, width = score_OB.shape
        if self.group == "row":
            return ~lowest(score_OB, self.block_budget(1, start, start + width))
        budget = self.block_budget(rows, start, start + width)
        return ~lowest(score_OB.reshape(1, -1), budget).view(rows, width)

    def check(self, keep_OI: Tensor) -> None:
        rows, columns = keep_OI.shape
        removed_OI = ~keep_OI
        if self.group == "row":
            asked, found = int(columns * self.sparsity), removed_OI.sum(1)
        else:
            asked, found = int(rows * columns * self.sparsity), removed_OI.sum()
        if not bool((found == asked).all()):
            raise PatternError(f"{self} asked for {asked} zeros per {self.group}, the mask has {found.tolist()}")

    def __str__(self) -> str:
        return f"{self.sparsity:.6g}"


@dataclass(frozen=True)
class Count:
    """Remove exactly `removed` of the `total` weights of a matrix: one site's part of a budget over several.

    Of a comparison group smaller than the matrix each gets a share: as equal as whole weights allow, and in all exact.
    An error in one output may cost more than in another, so rows may be multiplied by `row_scales` while they are solved:
    `row_levels` has a byte for each, see `as_row_levels`; none where rows are alike.
    """

    removed: int
    total: int
    group: ComparisonGroup = "layer"
    row_levels: bytes = b""

    row_wise: ClassVar[bool] = False  # how many weights a row loses depends on its place

    @property
    def sparsity(self) -> float:
        return self.removed / self.total

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if rows * columns == self.total else f"has {rows * columns} weights, not {self.total}"

    def keep(self, score_OI: Tensor) -> Tensor:
        rows, columns = score_OI.shape
        if self.group == "row":
            return ~lowest_of_rows(score_OI, self._of_rows(rows))
        if self.group == "block":
            return torch.cat([self.keep_block(score_OI[:, s:e], s) for s, e in column_blocks(columns)], dim=1)
        return ~lowest(score_OI.reshape(1, -1), self.removed).view(rows, columns)

    def keep_block(self, score_OB: Tensor, start: int) -> Tensor:
        rows, width = score_OB.shape
        columns, stop = self.total // rows, start + width
        if self.group == "row":
            counts = self._of_rows(rows)
            return ~lowest_of_rows(score_OB, [_share(count, columns, start, stop) for count in counts])
        return ~lowest(score_OB.reshape(1, -1), _share(self.removed, columns, start, stop)).view(rows, width)

    def check(self, keep_OI: Tensor) -> None:
        found_O = (~keep_OI).sum(1).tolist()
        if (self.group == "row" and found_O != self._of_rows(len(found_O))) or sum(found_O) != self.removed:
            raise PatternError(f"asked for {self.removed} zeros, the mask has {sum(found_O)} or shares them unequally")

    @property
    def row_scales(self) -> Tensor:
        """What each row is to be multiplied by."""
        return torch.tensor(list(self.row_levels), dtype=torch.float32).sub(_LEVEL_OF_ONE).div(_LEVELS).exp2()

    def _of_rows(self, rows: int) -> list[int]:
        return [_share(self.removed, rows, row, row + 1) for row in range(rows)]

    def __str__(self) -> str:
        return f"{self.sparsity:.6g}"


@dataclass(frozen=True)
class Stacked:
    """Several matrices one below the other, each with a pattern of its own: what is solved at once shares its factors."""

    parts: tuple[Pattern, ...]
    rows: tuple[int, ...]

    row_wise: ClassVar[bool] = False

    @property
    def sparsity(self) -> float:
        return sum(part.sparsity * rows for part, rows in zip(self.parts, self.rows, strict=True)) / sum(self.rows)

    def misfit(self, rows: int, columns: int) -> str | None:
        faults = (part.misfit(height, columns) for part, height in zip(self.parts, self.rows, strict=True))
        return next((fault for fault in faults if fault), None)

    def keep(self, score_OI: Tensor) -> Tensor:
        pieces = zip(self.parts, score_OI.split(self.rows), strict=True)
        return torch.cat([part.keep(piece_RI) for part, piece_RI in pieces])

    def keep_block(self, score_OB: Tensor, start: int) -> Tensor:
        pieces = zip(self.parts, score_OB.split(self.rows), strict=True)
        return torch.cat([part.keep_block(piece_RB, start) for part, piece_RB in pieces])

    def check(self, keep_OI: Tensor) -> None:
        for part, piece_RI in zip(self.parts, keep_OI.split(self.rows), strict=True):
            part.check(piece_RI)


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive inputs of each output."""

    n: int
    m: int
    row_wise: ClassVar[bool] = True

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"has {columns} inputs, not divisible by {self.m}" if columns % self.m else None

    def keep(self, score_OI: Tensor) -> Tensor:
        return highest(score_OI.reshape(-1, self.m), self.n).reshape(score_OI.shape)

    def keep_block(self, score_OB: Tensor, start: int) -> Tensor:
        return self.keep(score_OB)

    def check(self, keep_OI: Tensor) -> None:
        kept = keep_OI.reshape(-1, self.m).sum(1)
        if not bool((kept == self.n).all()):
            raise PatternError(f"{self} is violated in {int((kept != self.n).sum())} groups of {self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse(text: str | float) -> Unstructured | NM:
    """Read `50%`, `0.5` or `N:M` (N kept of M).

    Raises:
        PatternError: the text is none of these, or asks for nothing or for everything to be removed.
    """
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise PatternError(f"pattern '{text}': N:M keeps N of every M weights, so 0 < N < M; for example 2:4")
        return NM(n, m)
    if match := re.fullmatch(r"(\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(%?)", text):
        sparsity = float(match[1]) / (100 if match[2] else 1)
        if not 0 < sparsity < 1:
            hint = f"; did you mean '{text}%'?" if not match[2] and 1 < sparsity < 100 else ""
            raise PatternError(f"pattern '{text}': the sparsity must lie between 0 and 1, both excluded{hint}")
        return Unstructured(sparsity)
    if "," in text:
        raise PatternError(f"one pattern is needed here, not '{text}': only prune takes several, in Python as a list")
    raise PatternError(f"pattern '{text}' is not a sparsity such as '50%' or '0.5', nor N:M such as '2:4'")


def folder_name(pattern: Unstructured | NM) -> str:
    """Return the pattern as the name of a folder on every file system: `50%`, `2of4`."""
    return f"{pattern.n}of{pattern.m}" if isinstance(pattern, NM) else f"{100 * pattern.sparsity:.6g}%"


def in_group(pattern: Unstructured | NM, group: ComparisonGroup) -> Unstructured | NM:
    """Return the pattern with its comparison group set; N:M always compares within its M inputs."""
    return replace(pattern, group=group) if isinstance(pattern, Unstructured) else pattern


def column_blocks(columns: int, width: int = BLOCK_COLUMNS) -> list[tuple[int, int]]:
    """Return the [start, stop) of every block of `width` columns; the last may be narrower."""
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def block_width(pattern: Pattern, width: int) -> int:
    """Return `width` rounded down so that no N:M group straddles two blocks of columns; at least one group."""
    group = pattern.m if isinstance(pattern, NM) else 1
    return max(width // group * group, group)


def _share(count: int, parts: int, start: int, stop: int) -> int:
    """Return how much of `count`, spread over `parts`, is in those from `start` to `stop`; over all parts it is exact."""
    return count * stop // parts - count * start // parts


def as_numbers(keep_OI: Tensor) -> Tensor:
    """Return a mask, seen as zeros and ones: torch multiplies by these three times as fast as by booleans."""
    return keep_OI.view(torch.uint8)
