"""The sums of one stage over the inputs that the lanes of several ranks see.

Sums of floating point numbers depend on their order, so no rank sums a part of the sequences. Instead, turn by turn,
each rank runs one lane and hands what its sites were fed to all, and every sum is taken in the order of the sequences.
Where that is little, several turns are handed round at once, as each time the ranks wait for the slowest.
The work is shared by parts of the sums: the tiles of Gram matrices are dealt out, and handed round at the end.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from llmprune.model.groups import Group, StatisticType
from llmprune.statistics import ColumnNorm, Gram, Tile
from llmprune.team.parcels import HELD_BYTES, Parcels
from llmprune.team.team import deal

_MOST_TURNS = 16  # that are handed round at once


class Fed(NamedTuple):
    """What is added to the statistic of a group at once, of `sequences` sequences with so many tokens.

    It goes with the inputs [tokens, inputs], and with a dense target also those of the dense model; for column norms
    with one tensor of squared norms [inputs].
    """

    group: int
    sequences: int
    tokens: int
    tensors: int  # how many


class Tally:
    """Fills in the statistics of groups: `take` what this rank's lane is fed, `end_turn` on all ranks, then `complete`.

    Args:
        parcels: of the ranks.
        needs: the kind of statistic.
        groups: the same on all ranks.
        uneven: the tokens of the longest batch of all ranks over those of the shortest.
    """

    def __init__(self, parcels: Parcels, needs: StatisticType, groups: Sequence[Group], uneven: float) -> None:
        self._parcels, self._needs, self._groups, self._uneven = parcels, needs, groups, uneven
        self._team = parcels.team
        self._tiles: dict[int, list[list[Tile]]] = {}  # of each group, by their owners
        self._load = [0.0] * self._team.size
        self._turn: list[Fed] = []  # what was taken of this one
        self._held: list[list[Fed]] = []  # and of those before, since the last exchange
        self._turns = 1  # until the next one

    def take(self, group: int, sequences: int, parts_TI: Sequence[Tensor]) -> None:
        """Take inputs of a group, as they are now: the model may change them later."""
        for part_TI in parts_TI:
            self._parcels.put(ColumnNorm.squares(part_TI) if self._needs is ColumnNorm else part_TI)
        self._turn.append(Fed(group, sequences, len(parts_TI[0]), len(parts_TI)))

    def end_turn(self) -> None:
        """Go on to the next sequence of each rank."""
        self._held.append(self._turn)
        self._turn = []
        if len(self._held) == self._turns:
            self._exchange()

    def _exchange(self) -> None:
        """Add what was taken, turn by turn, and each rank's in turn."""
        turns, self._held = self._held, []
        several, most = len(turns) > 1, 0
        arriving = self._parcels.swap(turns, at_once=several)
        told = list(arriving) if several else arriving
        for turn in range(len(turns)):
            for theirs, size, tensors in told:
                most = max(most, size)
                for fed in theirs[turn]:
                    self._add(fed, list(islice(tensors, fed.tensors)))
        room = HELD_BYTES * len(turns) / self._uneven / max(most, 1) / self._team.size
        self._turns = max(1, min(_MOST_TURNS, round(room)))  # the same on all ranks

    def complete(self) -> None:
        """Hand round what is left, and the tiles, so that all ranks have all sums."""
        if self._held:
            self._exchange()
        self._parcels.let_go()
        for number, dealt in sorted(self._tiles.items()):
            statistic = self._groups[number].statistic
            assert isinstance(statistic, Gram)
            for rank, tiles in enumerate(dealt):
                self._parcels.hand([part for tile in tiles for part in statistic.parts(tile)], rank)

    def _add(self, fed: Fed, tensors: Sequence[Tensor]) -> None:
        group = self._groups[fed.group]
        if group.statistic is None:
            group.statistic = self._needs(group.inputs, self._parcels.device)
        if self._needs is ColumnNorm and isinstance(group.statistic, ColumnNorm):
            group.statistic.add_squares(tensors[0], fed.sequences, fed.tokens)
        elif not isinstance(group.statistic, Gram):
            group.statistic.add(tensors[0], fed.sequences)
        else:
            if fed.group not in self._tiles:
                self._tiles[fed.group] = self._dealt(Gram.tiles(tensors[0]))
            tiles = self._tiles[fed.group][self._team.rank]
            group.statistic.add(tensors[0], fed.sequences, *tensors[1:], tiles=tiles)

    def _dealt(self, tiles: Sequence[Tile]) -> list[list[Tile]]:
        owners = deal([(stop - start) * stop for start, stop in tiles], self._load)
        return [
            [tile for tile, owner in zip(tiles, owners, strict=True) if owner == rank]
            for rank in range(self._team.size)
        ]
