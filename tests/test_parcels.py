"""Parcels of all ranks arrive whole and in order, by way of shared memory or not, in little memory that is used again."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from llmprune.model.groups import Group
from llmprune.model.sites import Site
from llmprune.model.tally import Tally
from llmprune.statistics import Gram
from llmprune.team import board, parcels
from llmprune.team.board import shared_memory
from llmprune.team.parcels import Parcels
from llmprune.team.team import Team

T = TypeVar("T")
CPU = torch.device("cpu")
RANKS = 3


class Threads(Team):
    """A rank that is a thread of this process."""

    size = RANKS

    def __init__(self, rank: int, told: list[Any], barrier: threading.Barrier, sent: list[Any]) -> None:
        self.rank = rank
        self._told, self._barrier, self._sent = told, barrier, sent

    def gather(self, value: T) -> list[T]:
        self._told[self.rank] = value
        self._barrier.wait(10)
        found = list(self._told)
        self._barrier.wait(10)
        return found

    def start(self, tensor: Tensor, source: int) -> Callable[[], None]:
        if source == self.rank:
            for other in range(self.size):
                self._sent[source][other].put(tensor.clone())
            return lambda: None

        def finish() -> None:
            tensor.copy_(self._sent[source][self.rank].get(timeout=10))

        return finish


def by_all(work: Callable[[Team], T]) -> list[T]:
    """Return what the work of each rank comes to."""
    told, barrier = [None] * RANKS, threading.Barrier(RANKS)
    sent = [[queue.Queue[Tensor]() for _ in range(RANKS)] for _ in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, told, barrier, sent)), range(RANKS)))


def of_rank(rank: int, time: int) -> list[Tensor]:
    """Return tensors of several kinds; more and larger ones of later ranks and times, none of the first rank."""
    whole = torch.arange(40 * (time + 1), dtype=torch.float32).view(-1, 8) + 1000 * rank
    return [whole, whole[:, ::2].to(torch.bfloat16), whole[:0], whole[:, 0]][: 2 * rank]


def lying(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield tensors that lie as torch lays them, as all should."""
    for tensor in tensors:
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0
        yield tensor


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("held", [1 << 20, 1 << 12])
def test_parcels_arrive_as_they_were_sent(
    shared: bool, at_once: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        parcels, "HELD_BYTES", held
    )  # the larger ones do not fit into shared memory of the smaller size
    monkeypatch.setattr(parcels, "_MOST_SHARED", 1 << 13)  # and some never do

    def work(team: Team) -> list[list[tuple[int, list[Tensor]]]]:
        post, found = Parcels(team, CPU, shared), []
        for time in range(9):
            for tensor in of_rank(team.rank, time):
                post.put(tensor)
            arriving = post.swap(team.rank, at_once)
            told = list(arriving) if at_once else arriving
            found.append([(rank, [tensor.clone() for tensor in lying(tensors)]) for rank, _, tensors in told])
        return found

    for found in by_all(work):
        for time, parcels_of_all in enumerate(found):
            assert [rank for rank, _ in parcels_of_all] == list(range(RANKS))
            for rank, tensors in parcels_of_all:
                for tensor, sent in zip(tensors, of_rank(rank, time), strict=True):
                    assert tensor.dtype == sent.dtype and torch.equal(tensor, sent)


def test_memory_is_used_again_and_let_go_of_where_it_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "HELD_BYTES", 1 << 20)

    def work(team: Team) -> tuple[list[int], int, int]:
        post, places = Parcels(team, CPU, shared=False), list[int]()
        for _ in range(3):
            post.put(torch.zeros(200, 1024))
            places.append(
                sum(tensor.data_ptr() for _, _, tensors in post.swap(None, at_once=False) for tensor in tensors)
            )
        used = len(post._private) + sum(len(room) for room in post._rooms)
        post.let_go()
        return places, used, len(post._own)

    found = by_all(work)
    assert all(len(set(places)) == 1 and left == 0 for places, _, left in found)
    assert max(used for _, used, _ in found) == 3 * 200 * 1024 * 4


@pytest.mark.parametrize("times", [1, 4])
def test_memory_takes_no_more_than_foretold(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "_MOST_SHARED", 1 << 16)

    def work(team: Team) -> int:
        post = Parcels(team, CPU, shared=False)
        for _ in range(2):
            for rows in [100] * times + [50]:
                post.put(torch.zeros(rows, 256))
            list(post.swap(None, at_once=False))
        return len(post._private) + sum(len(room) for room in post._rooms)

    assert max(by_all(work)) <= parcels.most_bytes((100 * times + 50) * 1024, RANKS)


def test_shared_memory_becomes_as_large_as_what_is_handed_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcels, "HELD_BYTES", 1 << 12)
    sent: list[int] = []

    def work(team: Team) -> int:
        post = Parcels(team, CPU)
        start = team.start

        def noted(tensor: Tensor, source: int) -> Callable[[], None]:
            sent.append(source)
            return start(tensor, source)

        monkeypatch.setattr(team, "start", noted)
        for _ in range(3):
            post.put(torch.full((200, 64), 1.0 + team.rank))
            found = [(rank, float(tensor.mean())) for rank, _, (tensor,) in post.swap(team.rank)]
            assert found == [(rank, 1.0 + rank) for rank in range(RANKS)]
        return len(post._private) + sum(map(len, post._rooms))

    assert by_all(work) == [0] * RANKS
    assert len(sent) == RANKS * RANKS, "only the first parcels were too large for it"


def test_memory_is_shared_by_ranks_that_see_it() -> None:
    def write_and_look(team: Team) -> list[int]:
        found = shared_memory(team, 4096)
        assert found is not None
        found[team.rank][100] = team.rank + 1
        team.gather(None)
        return [int(memory[100]) for memory in found]

    assert by_all(write_and_look) == [[1, 2, 3]] * RANKS


def test_memory_that_one_rank_cannot_share_or_see_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made, files = board._made, len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", lambda name: (_ for _ in ()).throw(OSError()))
        assert by_all(lambda team: shared_memory(team, 4096)) == [None] * RANKS
    strange = {
        "another file": lambda address: address._replace(token=bytes(16)),
        "no such file": lambda address: address._replace(file=100_000),
        "no such process": lambda address: address._replace(process=2**30),
        "nothing of this kind": lambda address: address._replace(file=0),
    }
    for change in strange.values():
        with monkeypatch.context() as patch:
            patch.setattr(board, "_seen", lambda one, size, change=change, seen=board._seen: seen(change(one), size))
            assert by_all(lambda team: shared_memory(team, 4096)) == [None] * RANKS
    assert board._made is made and len(os.listdir("/proc/self/fd")) == files, "files are closed"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("held", [1 << 22, 1])  # several turns are handed round at once, or none with another
def test_sums_are_those_of_one_process(shared: bool, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.model.tally.HELD_BYTES", held)
    generator = torch.Generator().manual_seed(0)
    fed = [[torch.randn(tokens, width, generator=generator) for width in (520, 40)] for tokens in (7, 0, 9, 3, 5, 8, 2)]

    def work(team: Team) -> list[Tensor]:
        modules = [nn.Linear(x_TI.shape[1], 1) for x_TI in fed[0]]
        groups = [Group([Site("weight", module, "weight", (1, module.in_features), False)]) for module in modules]
        tally = Tally(Parcels(team, CPU, shared), Gram, groups, 1.0)
        mine = team.share(fed)
        for turn in range(3):
            for number, x_TI in enumerate(mine[turn] if turn < len(mine) else []):
                tally.take(number, 1, [x_TI])
            tally.end_turn()
        tally.complete()
        return [group.statistic.hessian_II for group in groups if isinstance(group.statistic, Gram)]

    alone = [Gram(width, CPU) for width in (520, 40)]
    for inputs in fed:
        for gram, x_TI in zip(alone, inputs, strict=True):
            gram.add(x_TI, 1)
    for sums in by_all(work):
        assert all(torch.equal(summed, gram.hessian_II) for summed, gram in zip(sums, alone, strict=True))
