"""What a run asks of the processes that work on it; here, of a process that is on its own."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Team:
    """One process on its own: all of the work is its share, and there is nobody to tell anything.

    Attributes:
        rank: the number of this process.
        size: how many processes there are.
        neighbours: how many of them are on this machine.
    """

    rank = 0
    size = 1
    neighbours = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's share of the items: each `size`-th, so that turn by turn all ranks' are in order."""
        return list(items[self.rank :: self.size])

    def owner(self, number: int) -> int:
        """Return the rank that has the item of this number in its share."""
        return number % self.size

    def number(self, place: int) -> int:
        """Return the number of the item at a place of this rank's share."""
        return place * self.size + self.rank

    def place(self, number: int) -> int | None:
        """Return the place in this rank's share of the item of this number; None if it is another's."""
        return number // self.size if self.owner(number) == self.rank else None

    def at(self, place: str) -> None:
        """Note what this rank is working on, for what is said if another is lost there."""

    def tell(self, value: T, source: int = 0) -> T:
        """Return the value that rank `source` gives. All ranks must call this, as all methods below."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the value that each rank gives, in their order."""
        return [value]

    def each(self, numbers: Sequence[int], find: Callable[[int], T]) -> list[T]:
        """Return what `find` makes of each of these items, in their order; it is called by the rank that has the item.

        It is called with the place of the item in that rank's share.
        """
        found = self.gather([find(place) for number in numbers if (place := self.place(number)) is not None])
        turns = [iter(values) for values in found]
        return [next(turns[self.owner(number)]) for number in numbers]

    def hand(self, tensor: Tensor, source: int) -> None:
        """Overwrite the tensor, of the same shape and dtype on all ranks, with that of rank `source`."""
        self.start(tensor, source)()

    def start(self, tensor: Tensor, source: int) -> Callable[[], None]:
        """Start to `hand` a tensor and return what waits for it; ranks must start several in the same order."""
        return lambda: None


def in_turn(shares: Sequence[Sequence[T]]) -> list[T]:
    """Put together what `Team.share` has taken apart."""
    longest = max(map(len, shares), default=0)
    return [share[turn] for turn in range(longest) for share in shares if turn < len(share)]


def deal(costs: Sequence[float], load: list[float]) -> list[int]:
    """Return the rank that takes each piece of work: the costliest first, each to the rank with the least to do.

    `load` is what each rank has to do already, and is added to. The longest processing time rule (Graham, 1969), which
    is within 4/3 of the best.
    """
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        owners[item] = load.index(min(load))
        load[owners[item]] += costs[item]
    return owners
