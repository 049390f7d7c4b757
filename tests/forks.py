"""Processes forked from a server that has imported what a run needs: one import of torch for all of them."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["warm", "faults", "ranks", "zoo.check"])


def process(target: Callable[..., None], arguments: Any) -> ForkServerProcess:
    """Return a process that is not started yet.

    The server passes over what it cannot import, so it needs the path of whatever test is the first to ask; and a
    process with threads cannot be forked safely.
    """
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return _CONTEXT.Process(target=target, args=arguments)
