"""Several ranks on this machine: processes that run the same jobs, as a launcher would start them."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import llmprune
from llmprune import cli
from llmprune.team.joining import joined

Job = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and options of `llmprune.prune`

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["warm", "faults", "ranks"])
_LONGEST = 120  # seconds for processes to end


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Ranks:
    """The processes of a launch; `codes` waits for them and returns how they ended.

    Args:
        size: how many.
        said: folder for what each says on stderr, in `said/RANK`.
        target: what each does, with `arguments`.
        environment: what more is set for all of them.
    """

    def __init__(
        self, size: int, said: Path, target: Callable[..., None], *arguments: Any, **environment: str
    ) -> None:
        said.mkdir(parents=True, exist_ok=True)
        self._said = said
        variables = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **environment}
        self.processes = [
            _FORKS.Process(
                target=_start, args=(variables | {"RANK": str(rank)}, said / str(rank), target, arguments)
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def codes(self) -> list[int | None]:
        """Return the exit codes, minus a signal's number."""
        until = time.monotonic() + _LONGEST
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        """Return what a rank has said on stderr."""
        return (self._said / str(rank)).read_text("utf-8")


def prune_all(jobs: Sequence[Job]) -> None:
    """Do one prune after another."""
    with joined():
        for arguments, options in jobs:
            llmprune.prune(*arguments, **options)


def command(arguments: Sequence[str | Path], strike: dict[str, Any] | None = None) -> None:
    """Run the command line; `strike` is what befalls one of the ranks."""
    if strike and strike["rank"] == int(os.environ["RANK"]):
        _strike_at(**strike)
    sys.argv = ["llmprune", *map(str, arguments)]
    cli.main()


def _strike_at(rank: int, stage: str, how: str, told: Path) -> None:
    """Let something befall this process once it works on a stage."""
    from llmprune.model import Streamed

    load = Streamed.load

    def load_or_die(host: Streamed, loaded: Any, *rest: Any) -> None:
        if loaded.name == stage:
            told.touch()
            if how == "error":
                raise llmprune.LlmpruneError("a disk is gone")
            os.kill(os.getpid(), signal.SIGSTOP if how == "hang" else signal.SIGKILL)
        load(host, loaded, *rest)

    Streamed.load = load_or_die  # type: ignore[method-assign]


def _start(variables: dict[str, str], said: Path, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)
