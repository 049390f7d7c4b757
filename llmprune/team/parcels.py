"""Tensors that all ranks hand to all others, in memory that is used again: fresh pages cost more than a copy."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from llmprune.team.board import shared_memory
from llmprune.team.team import Team

T = TypeVar("T")
Kind = tuple[tuple[int, ...], torch.dtype]

HELD_BYTES = 16 << 20  # of all ranks, that may wait to be handed round at once; memory for so much is kept
AHEAD = 2  # parcels of other ranks, if they are large, that one has room for: the next comes while one is read
_MOST_SHARED = 256 << 20  # bytes of a parcel in memory that all ranks see, which keep it as long as they run
_ALIGNMENT = 64  # bytes: tensors that lie as torch lays them are multiplied in the same way


def most_bytes(size: int, ranks: int) -> int:
    """Return the memory that a rank's parcels and those of others take at most, if all are of `size` bytes or fewer."""
    if size <= _MOST_SHARED:  # on one machine, where several small ones are put in one
        return 2 * max(HELD_BYTES, ranks * size)
    return size + size // 4 + min(AHEAD, ranks - 1) * size


class Parcels:
    """One parcel a rank: `put` tensors into this rank's, then `swap` it with those of all others.

    Parcels of ranks on one machine lie in memory that all of them see; the first ones that are larger than it show how
    large it must be. Others are broadcast, several at a time. All ranks must make one at the same time, as they must
    call `swap`.

    Args:
        team: the ranks.
        device: where the tensors are, and are to arrive.
        shared: whether to look for memory that all ranks see.
    """

    def __init__(self, team: Team, device: torch.device, shared: bool = True) -> None:
        self.team, self.device = team, device
        self._shared: list[Tensor] | None = None
        self._most_shared = 0  # bytes of a parcel
        if shared and device.type == "cpu":
            self._share(_aligned(2 * HELD_BYTES // team.size))  # more than its part, as some are larger
        self._half = 0  # of each rank's shared memory: others may still read the one that it has filled before
        self._private = self._bytes(0)
        self._rooms = [self._bytes(0)] * max(AHEAD, team.size)  # for the parcels of others
        self._kinds: list[Kind] = []
        self._filled = 0
        self._own = self._private
        self.empty()

    def put(self, tensor: Tensor) -> None:
        """Add a tensor to this rank's parcel, as it is now."""
        kind, start = _kind(tensor), self._filled
        self._filled += _room(kind)
        if self._filled > len(self._own):
            self._own = self._larger(self._own[:start])
        self._kinds.append(kind)
        _view(self._own, start, kind).copy_(tensor)

    def swap(self, label: T, at_once: bool = True) -> Iterator[tuple[T, int, Iterator[Tensor]]]:
        """Yield the label of each rank, in their order, the bytes of its parcel and the tensors in it.

        Args:
            label: of this rank's.
            at_once: all tensors stay as they are until the next `put`; otherwise those of a rank only until those of
                the next one are asked for, which takes less memory.
        """
        told = self.team.gather((label, self._kinds, self._filled, self._own is not self._private))
        sizes = [size for _, _, size, _ in told]
        ahead = self.team.size if at_once else AHEAD
        parcels = self._looked_at() if all(shared for *_, shared in told) else self._sent(sizes, ahead)
        for (theirs, kinds, size, _), parcel in zip(told, parcels, strict=True):
            yield theirs, size, _views(parcel, kinds)
        self._half = 1 - self._half
        if self._shared is not None and self._most_shared < max(sizes) <= _MOST_SHARED:
            self._share(_aligned(max(sizes)))
            self._forget_private()
        self.empty()

    def hand(self, tensors: Sequence[Tensor], source: int) -> None:
        """Overwrite tensors, of the same shapes and dtypes on all ranks, with those of rank `source`, sent as one."""
        kinds = [_kind(tensor) for tensor in tensors]
        parcel = self._bytes(sum(map(_room, kinds)))
        views = list(_views(parcel, kinds))
        if source == self.team.rank:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor)
        self.team.hand(parcel, source)
        if source != self.team.rank:
            for view, tensor in zip(views, tensors, strict=True):
                tensor.copy_(view)

    def empty(self) -> None:
        """Take everything out of this rank's parcel; the next one begins where one of that size would lie."""
        shared = self._shared is not None and self._filled <= self._most_shared
        self._own = self._halves(self.team.rank) if shared else self._private
        self._kinds, self._filled = [], 0

    def let_go(self) -> None:
        """Empty this rank's parcel, and let go of memory of which others may have more need."""
        if len(self._private) + sum(map(len, self._rooms)) > HELD_BYTES:
            self._forget_private()
        self.empty()

    def _forget_private(self) -> None:
        self._private = self._bytes(0)
        self._rooms = [self._private] * len(self._rooms)

    def _share(self, size: int) -> None:
        """Look for memory for parcels of `size` bytes that all ranks see; they must do so at the same time."""
        self._shared = shared_memory(self.team, 2 * size)
        self._most_shared = size if self._shared else 0

    def _larger(self, begun: Tensor) -> Tensor:
        """Return this rank's own memory with room for all that it has, and what it has begun with in it."""
        if len(self._private) < self._filled:
            self._private = self._bytes(max(self._filled, len(self._private) * 5 // 4))
        self._private[: len(begun)] = begun
        return self._private

    def _halves(self, rank: int) -> Tensor:
        assert self._shared is not None
        return self._shared[rank][self._half * self._most_shared :][: self._most_shared]

    def _looked_at(self) -> Iterator[Tensor]:
        """Yield the parcels where they lie, in memory that all ranks see."""
        return map(self._halves, range(self.team.size))

    def _sent(self, sizes: Sequence[int], ahead: int) -> Iterator[Tensor]:
        """Yield the parcels as they arrive, in the order of ranks; no more than `ahead` are on their way or in use."""
        started = list[Callable[[], Tensor]]()
        for rank in range(len(sizes)):
            for other in range(len(started), min(rank + ahead, len(sizes))):
                started.append(self._start(other, sizes[other], other % ahead))
            yield started[rank]()

    def _start(self, rank: int, size: int, room: int) -> Callable[[], Tensor]:
        """Start to broadcast a rank's parcel; return what waits for it and returns it."""
        if rank != self.team.rank and len(self._rooms[room]) < size:
            self._rooms[room] = self._bytes(size)
        parcel = (self._own if rank == self.team.rank else self._rooms[room])[:size]
        finish = self.team.start(parcel, rank)

        def finished() -> Tensor:
            finish()
            return parcel

        return finished

    def _bytes(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def _kind(tensor: Tensor) -> Kind:
    return tuple(tensor.shape), tensor.dtype


def _views(parcel: Tensor, kinds: Sequence[Kind]) -> Iterator[Tensor]:
    start = 0
    for kind in kinds:
        yield _view(parcel, start, kind)
        start += _room(kind)


def _view(parcel: Tensor, start: int, kind: Kind) -> Tensor:
    shape, dtype = kind
    return parcel[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _room(kind: Kind) -> int:
    """Return the bytes from the start of a tensor to where the next one may start."""
    shape, dtype = kind
    return _aligned(prod(shape) * dtype.itemsize)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
