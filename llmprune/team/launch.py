"""What a launcher such as `torchrun` has told this process, in the environment variables that torch.distributed reads."""

import os
from typing import NamedTuple

from llmprune.errors import RankError

TIMEOUT = "LLMPRUNE_RANK_TIMEOUT"  # seconds without a sign of life after which a rank is given up
_DEFAULT_TIMEOUT = 60.0


class Launch(NamedTuple):
    """This process's number, how many there are, and how many of them are on this machine."""

    rank: int = 0
    size: int = 1
    neighbours: int = 1


def launch() -> Launch:
    """Return what the launcher has set; one process on its own where there was none.

    Raises:
        RankError: the variables contradict each other.
    """
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if not all(found.values()):
        return Launch()
    try:
        rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except ValueError:
        raise RankError(f"the environment variables {found} are not numbers: start with torchrun") from None
    if not 0 <= rank < size:
        raise RankError(f"RANK={rank} is not below WORLD_SIZE={size}: start with torchrun")
    return Launch(rank, size, neighbours)


def patience() -> float:
    """Return the seconds without a sign of life after which a rank is given up.

    Raises:
        RankError: the variable is no positive number.
    """
    text = os.environ.get(TIMEOUT, str(_DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise RankError(f"{TIMEOUT} must be a number of seconds of at least 1, not '{text}'")
    return seconds
