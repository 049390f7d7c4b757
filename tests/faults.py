"""Faults on demand: a run in a process of its own that is stopped at a chosen call to the operating system.

A call is an event; a run can be stopped before it, after it and, where it writes, half-way through it.
"""

import errno
import io
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import forks
import llmprune
from llmprune import cli
from llmprune.checkpoint import durable

Strike = Callable[[], None]

_WRITES: tuple[tuple[Any, str], ...] = ((os, "write"), (os, "pwrite"))
_OTHERS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (shutil, "copyfile"),
    (durable, "_exchange"),
)  # fmt: skip
# Of a report: how the source was named, and what was measured.
_VARYING = ("model", "timings", "peak_memory_bytes", "memory_bytes")


class Events:
    """Counts the moments before, in and after calls of a run, and strikes at the one with number `point`."""

    def __init__(self, point: int | None = None, strike: Strike | None = None) -> None:
        self.names: list[str] = []
        self._point, self._strike = point, strike

    def watch(self) -> None:
        """Watch this process from now on."""
        for module, name in (*_WRITES, *_OTHERS):
            setattr(module, name, self._watched(getattr(module, name), name, (module, name) in _WRITES))

    def _watched(self, call: Callable[..., Any], name: str, writes: bool) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            self._at(f"before {name}")
            if writes and self._due():
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
            if writes:
                self._at(f"in {name}")
            result = call(*args, **options)
            self._at(f"after {name}")
            return result

        return watched

    def _due(self) -> bool:
        return len(self.names) == self._point

    def _at(self, moment: str) -> None:
        due = self._due()
        self.names.append(moment)
        if due and self._strike:
            self._strike()


def kill() -> None:
    """End this process as a power cut would end it, as far as a process can."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Send this process what Ctrl-C sends it."""
    signal.raise_signal(signal.SIGINT)


def terminate() -> None:
    """Send this process what a scheduler sends it before its time is up."""
    signal.raise_signal(signal.SIGTERM)


def fill_disk() -> None:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def change(path: Path, how: str) -> None:
    """Do to a file what somebody else might do meanwhile."""
    data = path.read_bytes()
    if how == "truncated":
        os.truncate(path, len(data) // 2)
    elif how == "rewritten":
        path.write_bytes(bytes(len(data)))
    elif how == "touched":
        os.utime(path, ns=(0, 0))
    elif how == "edited":  # a bit of every tensor, with the size and the time that the file had
        start, times = 8 + int.from_bytes(data[:8], "little"), path.stat()
        path.write_bytes(data[:start] + bytes(byte ^ (at % 16 == 0) for at, byte in enumerate(data[start:])))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        path.unlink()


def break_reads() -> None:
    """Let every read of a tensor's bytes fail as a broken disk does from now on."""
    plain = Path.open

    def broken(self: Path, mode: str = "r", buffering: int = -1, *args: Any) -> Any:
        return _Broken(self) if (mode, buffering) == ("rb", 0) else plain(self, mode, buffering, *args)

    Path.open = broken  # type: ignore[assignment, method-assign]


class _Broken(io.FileIO):
    def readinto(self, buffer: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def prune(
    *arguments: Any,
    point: int | None = None,
    strike: Strike = kill,
    exchange: bool = True,
    log: Path | None = None,
    **options: Any,
) -> int:
    """Run `llmprune.prune` in a process of its own, struck at `point`; return its exit code, minus a signal's number.

    Without `exchange` its file system cannot swap two names in one step. The names of all events go to `log`.
    """
    return _exit_code(_prune, arguments, options, point, strike, exchange, log)


def command(*arguments: str | Path, said: Path, point: int | None = None, strike: Strike = kill) -> int:
    """Run the command line likewise; what it says on stderr goes to the file `said`."""
    return _exit_code(_command, [str(argument) for argument in arguments], said, point, strike)


def _exit_code(target: Callable[..., None], *arguments: Any) -> int:
    process = forks.process(target, arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _prune(
    arguments: Any, options: dict[str, Any], point: int | None, strike: Strike, exchange: bool, log: Path | None
) -> None:
    torch.set_num_threads(1)
    if not exchange:
        durable._exchange = lambda one, other: False
    events = Events(point, strike)
    events.watch()
    llmprune.prune(*arguments, **options)
    if log:
        log.write_text(json.dumps(events.names))


def _command(arguments: list[str], said: Path, point: int | None, strike: Strike) -> None:
    torch.set_num_threads(1)
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = ["llmprune", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
    Events(point, strike).watch()
    cli.main()


def content(folder: Path) -> dict[str, Any]:
    """Return all files of a model folder; of the report what is not measured."""
    found: dict[str, Any] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    if "llmprune.json" in found:
        report = json.loads(found["llmprune.json"])
        found["llmprune.json"] = {k: v for k, v in report.items() if k not in _VARYING}
    return found


def partial_of(out: Path) -> Path:
    """Return where the work for an output lies."""
    return out.with_name(out.name + ".partial")
