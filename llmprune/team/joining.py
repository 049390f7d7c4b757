"""Find the other processes of a run, and part from them, in peace or not."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llmprune.errors import RankError
from llmprune.team.launch import Launch, launch, patience
from llmprune.team.ranks import Ranks
from llmprune.team.team import Team
from llmprune.team.watch import Watch

_GATHERING = timedelta(minutes=5)  # for all ranks to appear
_LONGEST_STEP = timedelta(hours=2)  # that ranks which are alive wait for one


@contextmanager
def joined() -> Iterator[Team]:
    """Work within the block with the other processes that a launcher has started, if it has.

    The launcher may be `torchrun` or anything that sets the same variables (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), or one that has initialised torch.distributed already, as Ray Train does.

    Raises:
        RankError: the others do not appear, or one of them has left, is lost or cannot be reached.
    """
    ours = not (dist.is_available() and dist.is_initialized())
    launched = launch() if ours else Launch(dist.get_rank(), dist.get_world_size(), launch().neighbours)
    if launched.size == 1:
        yield Team()
        return
    team, watch = _join(launched, ours)
    try:
        yield team
        team.gather(None)  # none leaves before all are done
    except BaseException as error:
        found = _blamed(error, watch)
        watch.leave(str(found) if isinstance(found, RankError) else watch.last_words(found))
        if found is error:
            raise
        raise found from None
    watch.leave()
    if ours:
        dist.destroy_process_group()


def _join(launched: Launch, ours: bool) -> tuple[Ranks, Watch]:
    seconds = patience()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if ours:
        try:
            store, *_ = next(rendezvous("env://", launched.rank, launched.size, timeout=_GATHERING))
            store = _own_part(store, launched.rank)
            own_gpu = on_gpu and torch.cuda.device_count() >= launched.neighbours  # which nccl insists on
            backend = "nccl" if own_gpu and dist.is_nccl_available() else "gloo"
            watch = Watch(store, launched.rank, launched.size, seconds)
            dist.init_process_group(
                backend, store=store, rank=launched.rank, world_size=launched.size, timeout=_LONGEST_STEP
            )
        except (RuntimeError, ValueError) as error:
            cause = " ".join(str(error).split())[:200]
            raise RankError(f"rank {launched.rank} of {launched.size} cannot join the others: {cause}") from None
    else:
        store = _own_part(dist.distributed_c10d._get_default_store(), launched.rank)
        watch = Watch(store, launched.rank, launched.size, seconds)
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return Ranks(launched, watch, world), watch
    host = dist.new_group(backend="gloo", timeout=_LONGEST_STEP)
    return Ranks(launched, watch, host, world if dist.get_backend() == "nccl" else None), watch


def _own_part(store: Any, rank: int) -> Any:
    """Return the part of a store that is this team's: ranks that make several teams make them in the same order."""
    return PrefixStore(f"llmprune/{store.add(f'llmprune/teams/{rank}', 1)}", store)


def _blamed(error: BaseException, watch: Watch) -> BaseException:
    """Return why the run ends: launchers send SIGTERM to all when one rank is gone, and that one is to be named."""
    if isinstance(error, KeyboardInterrupt) and signal.SIGTERM in error.args and (who := watch.blame()):
        kept = error.args[0] if isinstance(error.args[0], str) else None
        return RankError(f"{who}; {kept}" if kept else who)
    return error
