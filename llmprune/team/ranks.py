"""A team of several processes, on torch.distributed: gloo between hosts' memories, nccl between GPUs."""

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmprune.errors import RankError
from llmprune.team.launch import Launch
from llmprune.team.team import Team
from llmprune.team.watch import Watch

T = TypeVar("T")

_SHORTEST, _LONGEST = 2e-5, 1e-3  # seconds between looks at an operation under way
_SHORT = 2048  # bytes of a value that are told together with how many there are: most have no more
_COUNT = 8  # bytes of that number


class Ranks(Team):
    """One of several processes.

    An operation is started and then looked at, not waited for: torch's own wait knows no reason to give up but its
    timeout, which must be longer than the longest solve.

    Args:
        launched: this process's number among the others.
        watch: tells which rank is lost.
        host: the group that exchanges tensors in the memory of hosts.
        device: the group that exchanges tensors on GPUs; None if these go through the hosts.

    All methods raise RankError if another rank has left, is lost or cannot be reached.
    """

    def __init__(self, launched: Launch, watch: Watch, host: Any, device: Any = None) -> None:
        self.rank, self.size, self.neighbours = launched
        self._watch, self._host, self._device = watch, host, device

    def at(self, place: str) -> None:
        self._watch.at(place)

    def tell(self, value: T, source: int = 0) -> T:
        data = _packed(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        start = _sized(data, _SHORT)
        self._finish(self._broadcast(start, source, self._host))
        left = max(0, _size(start) - _SHORT)
        rest = data[_SHORT:] if self.rank == source else torch.empty(left, dtype=torch.uint8)
        if left:
            self._finish(self._broadcast(rest, source, self._host))
        return value if self.rank == source else _unpacked(start, rest)

    def gather(self, value: T) -> list[T]:
        data = _packed(value)
        starts = self._all(_sized(data, _SHORT))
        longest = max(map(_size, starts)) - _SHORT
        rests = self._all(_padded(data[_SHORT:], longest)) if longest > 0 else [data[:0]] * self.size
        return [_unpacked(start, rest) for start, rest in zip(starts, rests, strict=True)]

    def start(self, tensor: Tensor, source: int) -> Callable[[], None]:
        group = self._device if tensor.is_cuda and self._device else self._host
        there = tensor.contiguous() if group is not self._host else tensor.cpu().contiguous()
        work = self._broadcast(there.view(-1).view(torch.uint8), source, group) if there.numel() else None

        def finish() -> None:
            if work:
                self._finish(work)
            if self.rank != source and there.data_ptr() != tensor.data_ptr():
                tensor.copy_(there)

        return finish

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, which are of one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        self._finish(self._begun(lambda: dist.all_gather(found, tensor, self._host, async_op=True)))
        return found

    def _broadcast(self, tensor: Tensor, source: int, group: Any) -> Any:
        return self._begun(lambda: dist.broadcast(tensor, source, group, async_op=True))

    def _begun(self, begin: Callable[[], Any]) -> Any:
        """Begin an operation and return it."""
        with self._blaming():
            return begin()

    def _finish(self, work: Any) -> None:
        """Return when an operation is done."""
        pause = _SHORTEST
        with self._blaming():
            while not work.is_completed():
                if pause >= _LONGEST and (who := self._watch.lost()):
                    raise RankError(who)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            work.wait()

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Turn what torch says of a broken connection into who is to blame for it."""
        try:
            yield
        except RuntimeError as error:
            who = self._watch.blame() or f"the connection to another rank broke ({str(error)[:200]})"
            raise RankError(who) from None


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(start: Tensor, rest: Tensor) -> Any:
    """Return the value of which this is the start, as from `_sized`, and the rest, which may be padded."""
    data = start[_COUNT:].numpy().tobytes() + rest.numpy().tobytes()
    return pickle.loads(data[: _size(start)])


def _sized(data: Tensor, count: int) -> Tensor:
    """Return the first `count` bytes of the data, padded to that, after the number of all."""
    return torch.cat([torch.tensor([len(data)]).view(torch.uint8), _padded(data[:count], count)])


def _size(start: Tensor) -> int:
    return int(start[:_COUNT].view(torch.int64))


def _padded(data: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(data, (0, count - len(data)))
