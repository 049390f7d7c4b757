"""Memory that all ranks of one machine see: each writes in its own, and the others read it there.

Between processes of one machine sockets are the slowest way: the system copies what is sent twice, in small pieces.
"""

import mmap
import os
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.team.team import Team

_NAME = "llmprune"
_TOKEN = 16  # bytes at the start of a memory that tell it from all others


class _Address(NamedTuple):
    """Where a process has a memory: of no use on another machine, or in another container of this one."""

    process: int
    file: int
    token: bytes


def shared_memory(team: Team, size: int) -> list[Tensor] | None:
    """Return a memory of each rank, of so many bytes, which all of them see; None if one does not see another's.

    That is so where they are not all on one machine, the system has no such memory, or it does not let processes look
    into each other's. All ranks must call this at the same time. Pages that nobody has written to take no memory. It is
    freed with the tensors.
    """
    address = _made(size)
    try:
        seen = [_seen(address, size) for address in team.gather(address)]
        found = [memory for memory in seen if memory is not None]
        everyone = all(team.gather(len(found) == team.size))  # none closes its file, or writes, before all have looked
    finally:
        if address:
            os.close(address.file)
    return found if everyone else None


def _made(size: int) -> _Address | None:
    """Make a memory that starts with a token; None where that cannot be."""
    try:
        file = os.memfd_create(_NAME)
    except (AttributeError, OSError):  # not Linux, or an old one
        return None
    address = _Address(os.getpid(), file, os.urandom(_TOKEN))
    try:
        os.ftruncate(file, size)
        os.pwrite(file, address.token, 0)
    except OSError:  # no memory left
        os.close(file)
        return None
    return address


def _seen(address: _Address | None, size: int) -> Tensor | None:
    """Return the memory that a process has, of `size` bytes; None if this one does not see it."""
    if address is None:
        return None
    path = f"/proc/{address.process}/fd/{address.file}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None  # something of another process, as on another machine: opening it might do something
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        mapped = mmap.mmap(file, size)
    except (OSError, ValueError):  # another file, as in another container
        return None
    finally:
        os.close(file)
    return torch.frombuffer(mapped, dtype=torch.uint8) if mapped[:_TOKEN] == address.token else None
