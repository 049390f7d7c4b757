"""Memory that runs out while a matrix is solved: make room, and solve it again with the same result."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmprune.model.memory import give_back_freed_memory, is_out_of_memory
from llmprune.statistics import Gram

Relief = tuple[str, Callable[[], None]]  # what is done to make room, in words, and what does it

T = TypeVar("T")

_log = logging.getLogger(__name__)


def reliefs(statistic: Any, on_host: bool) -> list[Relief]:
    """Return what makes room on the device of a statistic, one step after another."""

    def forget() -> None:
        if isinstance(statistic, Gram):
            statistic.forget_factors()
        give_back_freed_memory(of_gpu=True)

    def move() -> None:
        statistic.move(torch.device("cpu"))
        give_back_freed_memory(of_gpu=True)

    steps: list[Relief] = [("after freeing what can be computed again", forget)]
    if on_host and statistic and statistic.device.type != "cpu":
        steps.append(("on the host", move))
    return steps


@dataclass
class Retry:
    """Solves rows of a matrix, and solves them again where memory runs out.

    Args:
        name: of the matrix.
        divisible: rows are independent, so that they can be solved in halves.
        generator: what the solver draws from; a second try draws the same.
        reliefs: what makes room.
    """

    name: str
    divisible: bool
    generator: torch.Generator
    reliefs: Sequence[Relief]
    notes: list[str] = field(default_factory=list, init=False)
    _most: int | None = field(default=None, init=False)  # rows at a time

    def solved(self, rows_OI: Tensor, solve: Callable[[Tensor], T]) -> Iterator[T]:
        """Yield what `solve` makes of the rows, in one part or in several.

        Raises:
            RuntimeError, MemoryError: memory runs out though all room is made, and for single rows where divisible.
        """
        for part_OI in rows_OI.split(self._most or len(rows_OI)):
            yield from self._solved(part_OI, solve)

    def _solved(self, rows_OI: Tensor, solve: Callable[[Tensor], T]) -> Iterator[T]:
        for how, relieve in self.reliefs:
            before = self.generator.get_state()
            outcome = _unless_out_of_memory(solve, rows_OI)
            if outcome is not None:
                yield outcome
                return
            self.generator.set_state(before)
            relieve()
            if self.divisible and len(rows_OI) > 1:
                self._most = len(rows_OI) // 2
                self._note(f"fewer rows at a time, {how}")
                yield from self.solved(rows_OI, solve)
                return
            self._note(how)
        yield solve(rows_OI)

    def _note(self, how: str) -> None:
        note = f"out of memory, solved again {how}"
        if note not in self.notes:
            self.notes.append(note)
            _log.warning("%s: %s", self.name, note)


def _unless_out_of_memory(solve: Callable[[Tensor], T], rows_OI: Tensor) -> T | None:
    """Return what `solve` returns; None where memory runs out, with all that it held let go of."""
    try:
        return solve(rows_OI)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
