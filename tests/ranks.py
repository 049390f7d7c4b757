"""Several ranks on this machine: processes that run the same jobs, as a launcher would start them."""

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import forks
import llmprune
from llmprune import cli
from llmprune.team import parcels
from llmprune.team.board import shared_memory
from llmprune.team.joining import joined

Job = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and options of `llmprune.prune`

LINK = "cable"  # the network device of each host
_NETWORK = "10.77.0"
_NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET
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
        hosts: the network namespace of each; that of this process if there are none.
        environment: what more is set for all of them.
    """

    def __init__(
        self,
        size: int,
        said: Path,
        target: Callable[..., None],
        *arguments: Any,
        hosts: Sequence[str] = (),
        **environment: str,
    ) -> None:
        said.mkdir(parents=True, exist_ok=True)
        self._said = said
        variables = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **environment}
        self.processes = [
            forks.process(_start, (variables | {"RANK": str(rank)}, said / str(rank), host, target, arguments))
            for rank, host in zip(range(size), [*hosts, *[None] * size], strict=False)
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

    def code(self, rank: int) -> int | None:
        """Wait for one of them alone."""
        self.processes[rank].join(_LONGEST)
        return self.processes[rank].exitcode

    def said(self, rank: int) -> str:
        """Return what a rank has said on stderr."""
        return (self._said / str(rank)).read_text("utf-8")


def prune_all(jobs: Sequence[Job]) -> None:
    """Do one prune after another."""
    with joined():
        for arguments, options in jobs:
            llmprune.prune(*arguments, **options)


def prune_all_apart(jobs: Sequence[Job]) -> None:
    """As `prune_all`, where ranks see no memory of each other's, as on two machines."""
    with mock.patch.object(parcels, "shared_memory", return_value=None):
        prune_all(jobs)


def tell_sharing(told: Path) -> None:
    """Write down whether the ranks see memory of each other's."""
    with joined() as team:
        found = shared_memory(team, 4096)
        if team.leads:
            told.write_text(json.dumps(found is not None))


def measure_all(source: Path, out: Path, ids: list[list[int]], told: Path) -> None:
    """Sweep, and evaluate what came of it; the first rank tells the figures."""
    options: dict[str, Any] = {"length": 16, "calibration": ids, "data": ids, "patterns": ["50%"], "speed": False}
    with joined() as team:
        sweep = llmprune.sweep(source, out, methods=["wanda", "magnitude"], **options)
        apart = llmprune.sweep(source, out / "apart", methods=["wanda"], separate=True, **options)
        found = llmprune.evaluate(sweep.rows[0].out, ids, dense=source, streamed=True, save=True)
        if team.leads:
            every = [*sweep.rows, *apart.rows, found]
            rows = [row.to_json() if hasattr(row, "to_json") else vars(row) for row in every]
            told.write_text(json.dumps(rows))


def command(arguments: Sequence[str | Path], strike: dict[str, Any] | None = None) -> None:
    """Run the command line; `strike` is what befalls one of the ranks."""
    if strike and strike["rank"] == int(os.environ["RANK"]):
        _strike_at(**strike)
    sys.argv = ["llmprune", *map(str, arguments)]
    cli.main()


def _strike_at(rank: int, stage: str, load: int, how: str) -> None:
    """Let something befall this process when it loads a stage for the `load`-th time."""
    from llmprune.model import Streamed

    load_stage, loads = Streamed.load, itertools.count(1)

    def load_or_die(host: Streamed, loaded: Any, *rest: Any) -> None:
        if loaded.name == stage and next(loads) == load:
            if how == "error":
                raise llmprune.LlmpruneError("a disk is gone")
            if how == "is cut off":
                ip("-n", host_name(rank), "link", "set", LINK, "down")
            else:
                os.kill(os.getpid(), signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
        load_stage(host, loaded, *rest)

    Streamed.load = load_or_die  # type: ignore[assignment, method-assign]


def ip(*arguments: str) -> None:
    """Run `ip`, of iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def host_name(rank: int) -> str:
    """Return the name of a rank's network namespace."""
    return f"llmprune-{rank}"


@contextlib.contextmanager
def two_hosts() -> Iterator[dict[str, Any]]:
    """Make two network namespaces with an address each and a cable between them; yield what `Ranks` needs of them."""
    hosts = [host_name(rank) for rank in range(2)]
    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", LINK, "netns", hosts[0], "type", "veth", "peer", "name", LINK, "netns", hosts[1])
        for number, host in enumerate(hosts, start=1):
            ip("-n", host, "address", "add", f"{_NETWORK}.{number}/24", "dev", LINK)
            ip("-n", host, "link", "set", LINK, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield {"hosts": hosts, "MASTER_ADDR": f"{_NETWORK}.1", "GLOO_SOCKET_IFNAME": LINK, "LOCAL_WORLD_SIZE": "1"}
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host)


def _move_to(host: str) -> None:
    with open(f"/run/netns/{host}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NETWORK_NAMESPACE):
            raise OSError(ctypes.get_errno(), host)


def _start(
    variables: dict[str, str], said: Path, host: str | None, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(variables)
    if host:
        _move_to(host)
    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)
