"""A team of several processes, on torch.distributed: gloo between hosts' memories, nccl between GPUs."""

import pickle
import time
from collections.abc import Callable
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
        length = torch.tensor([len(data)])
        self._broadcast(length, source, self._host)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(data, source, self._host)
        return value if self.rank == source else _unpacked(data)

    def gather(self, value: T) -> list[T]:
        data = _packed(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._finish(lambda: dist.all_gather(lengths, torch.tensor([len(data)]), self._host, async_op=True))
        longest = max(int(length) for length in lengths)
        padded = torch.nn.functional.pad(data, (0, longest - len(data)))
        found = [torch.empty_like(padded) for _ in range(self.size)]
        self._finish(lambda: dist.all_gather(found, padded, self._host, async_op=True))
        return [_unpacked(one[: int(length)]) for one, length in zip(found, lengths, strict=True)]

    def hand(self, tensor: Tensor, source: int) -> None:
        group = self._device if tensor.is_cuda and self._device else self._host
        there = tensor.contiguous() if group is not self._host else tensor.cpu().contiguous()
        if there.numel():
            self._broadcast(there.view(-1).view(torch.uint8), source, group)
        if self.rank != source and there.data_ptr() != tensor.data_ptr():
            tensor.copy_(there)

    def _broadcast(self, tensor: Tensor, source: int, group: Any) -> None:
        self._finish(lambda: dist.broadcast(tensor, source, group, async_op=True))

    def _finish(self, start: Callable[[], Any]) -> None:
        """Start an operation and return when it is done."""
        pause = _SHORTEST
        try:
            work = start()
            while not work.is_completed():
                if pause >= _LONGEST and (who := self._watch.lost()):
                    raise RankError(who)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            work.wait()
        except RuntimeError as error:
            who = self._watch.blame() or f"the connection to another rank broke ({str(error)[:200]})"
            raise RankError(who) from None


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())
