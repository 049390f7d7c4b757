"""Many checks, each in a process of its own: one that dies ends no other."""

import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers

import forks
from zoo.check import Row, check

LIMIT = 300.0  # seconds for one architecture

Job = tuple[str, str]  # architecture and dtype


def run(jobs: list[Job], at_once: int, work: Callable[[str, Path, str], Row] = check) -> Iterator[Row]:
    """Yield the row of every job as it ends; `work` is `check`, or another function of its kind."""
    waiting, running = list(reversed(jobs)), dict[Any, tuple[Any, Job, float]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            receiver, sender = Pipe(duplex=False)
            job = waiting.pop()
            process = forks.process(_child, (sender, work, *job))
            process.start()
            sender.close()
            running[receiver] = (process, job, time.monotonic())
        ready: list[Any] = wait(list(running), timeout=1.0)
        for receiver in ready:
            process, job, _ = running.pop(receiver)
            yield _received(receiver, job)
            process.join()
        for receiver, (process, job, started) in list(running.items()):
            if time.monotonic() - started > LIMIT:
                process.kill()
                del running[receiver]
                yield Row(*job, detail=f"took more than {LIMIT:.0f} s")


def _child(sender: Any, work: Callable[[str, Path, str], Row], name: str, dtype: str) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        sender.send(work(name, Path(folder), dtype))


def _received(receiver: Any, job: Job) -> Row:
    try:
        row: Row = receiver.recv()
    except EOFError:
        return Row(*job, detail="the process died")
    return row
