"""The sums of one stage over the inputs that the lanes of several ranks see.

Sums of floating point numbers depend on their order, so no rank sums a part of the sequences. Instead, turn by turn,
each rank runs one lane and hands what its sites were fed to all, and every sum is taken in the order of the sequences.
Where that is little, several turns are handed round at once, as each time the ranks wait for the slowest.
The work is shared by parts of the sums: the tiles of Gram matrices are dealt out, and handed round at the end.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.model.groups import Group, StatisticType
from llmprune.statistics import ColumnNorm, Gram, Tile
from llmprune.team.team import Team, deal

_MOST_TURNS = 16  # that are handed round at once
HELD_BYTES = 16 << 20  # that wait for that, of all ranks
_ALIGNMENT = 64  # bytes: tensors that lie as torch lays them are multiplied in the same way

Kind = tuple[tuple[int, ...], torch.dtype]


class Fed(NamedTuple):
    """What is added to the statistic of a group at once, of `sequences` sequences with so many tokens.

    The tensors are the inputs [tokens, inputs], and with a dense target also those of the dense model; for column norms
    they are one of squared norms [inputs].
    """

    group: int
    sequences: int
    tokens: int
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, group: int, sequences: int, parts_TI: Sequence[Tensor], needs: StatisticType) -> "Fed":
        """Return what is to be handed round of some inputs, as they are now: the model may change them later."""
        if needs is ColumnNorm:
            tensors = tuple(ColumnNorm.squares(part_TI) for part_TI in parts_TI)
        else:
            tensors = tuple(part_TI.clone(memory_format=torch.contiguous_format) for part_TI in parts_TI)
        return cls(group, sequences, len(parts_TI[0]), tensors)


class Tally:
    """Fills in the statistics of groups: `add` once a turn on all ranks, then `complete`.

    Args:
        team: the ranks.
        needs: the kind of statistic.
        groups: the same on all ranks.
        device: where the statistics are to be.
        uneven: the tokens of the longest batch of all ranks over those of the shortest.
    """

    def __init__(
        self, team: Team, needs: StatisticType, groups: Sequence[Group], device: torch.device, uneven: float
    ) -> None:
        self._team, self._needs, self._groups, self._device, self._uneven = team, needs, groups, device, uneven
        self._tiles: dict[int, list[list[Tile]]] = {}  # of each group, by their owners
        self._load = [0.0] * team.size
        self._held: list[Sequence[Fed]] = []  # of the turns since the last exchange
        self._turns = 1  # until the next one

    def add(self, given: Sequence[Fed]) -> None:
        """Take what this turn's lane has been fed."""
        self._held.append(given)
        if len(self._held) == self._turns:
            self._exchange()

    def _exchange(self) -> None:
        """Add what was taken, turn by turn, and each rank's in turn."""
        turns, self._held = self._held, []
        mine = [tensor for given in turns for fed in given for tensor in fed.tensors]
        listed = [[(fed.group, fed.sequences, fed.tokens, _kinds(fed.tensors)) for fed in given] for given in turns]
        of_ranks, tensors = self._team.gather(listed), dict[int, Iterator[Tensor]]()
        for turn in range(len(turns)):
            for rank, theirs in enumerate(of_ranks):
                if turn == 0:
                    kinds_of_all = [kind for feds in theirs for *_, kinds in feds for kind in kinds]
                    tensors[rank] = iter(self._from(rank, mine, kinds_of_all))
                for group, sequences, tokens, kinds in theirs[turn]:
                    self._add(Fed(group, sequences, tokens, tuple(islice(tensors[rank], len(kinds)))))
                if turn + 1 == len(turns):
                    del tensors[rank]  # before the next rank's take memory
        most = max(sum(_nbytes(kinds) for feds in theirs for *_, kinds in feds) for theirs in of_ranks)
        self._turns = max(
            1, min(_MOST_TURNS, round(HELD_BYTES * len(turns) / self._uneven / max(most, 1) / self._team.size))
        )  # the same on all ranks

    def complete(self) -> None:
        """Hand round what is left, and the tiles, so that all ranks have all sums."""
        if self._held:
            self._exchange()
        for number, dealt in sorted(self._tiles.items()):
            statistic = self._groups[number].statistic
            assert isinstance(statistic, Gram)
            for owner, tiles in enumerate(dealt):
                parts = [part for tile in tiles for part in statistic.parts(tile)]
                found = self._from(owner, parts, _kinds(parts))
                for part, summed in zip(parts, found, strict=True):
                    part.copy_(summed)

    def _add(self, fed: Fed) -> None:
        group = self._groups[fed.group]
        if group.statistic is None:
            group.statistic = self._needs(group.inputs, self._device)
        if self._needs is ColumnNorm and isinstance(group.statistic, ColumnNorm):
            group.statistic.add_squares(fed.tensors[0], fed.sequences, fed.tokens)
        elif not isinstance(group.statistic, Gram):
            group.statistic.add(fed.tensors[0], fed.sequences)
        else:
            if fed.group not in self._tiles:
                self._tiles[fed.group] = self._dealt(Gram.tiles(fed.tensors[0]))
            tiles = self._tiles[fed.group][self._team.rank]
            group.statistic.add(fed.tensors[0], fed.sequences, *fed.tensors[1:], tiles=tiles)

    def _dealt(self, tiles: Sequence[Tile]) -> list[list[Tile]]:
        owners = deal([(stop - start) * stop for start, stop in tiles], self._load)
        return [
            [tile for tile, owner in zip(tiles, owners, strict=True) if owner == rank]
            for rank in range(self._team.size)
        ]

    def _from(self, rank: int, mine: Sequence[Tensor], kinds: Sequence[Kind]) -> list[Tensor]:
        """Return the tensors of a rank, which go through one buffer."""
        places = list(_places(kinds))
        size = places[-1][1] if places else 0
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        views = [
            buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for (start, _), (shape, dtype) in zip(places, kinds, strict=True)
        ]
        if rank == self._team.rank:
            for view, tensor in zip(views, mine, strict=True):
                view.copy_(tensor)
        self._team.hand(buffer, rank)
        return views


def _kinds(tensors: Sequence[Tensor]) -> list[Kind]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def _nbytes(kinds: Sequence[Kind]) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in kinds)


def _places(kinds: Sequence[Kind]) -> Iterator[tuple[int, int]]:
    """Yield where each tensor starts in a buffer, and where the next one may."""
    start = 0
    for shape, dtype in kinds:
        stop = start + -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        yield start, stop
        start = stop
