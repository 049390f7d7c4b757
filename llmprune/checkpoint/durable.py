"""Writes that survive a crash of the machine, and moves that happen all at once or not at all."""

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path

_AT_FDCWD = -100  # paths are relative to the working folder
_RENAME_EXCHANGE = 2
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # how file systems say that they cannot do it


def copy(path: Path, target: Path) -> None:
    """Copy a file; its folders are made where they are missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    sync(target)


def write_text(path: Path, text: str) -> None:
    """Write a text file anew."""
    path.write_text(text, "utf-8")
    sync(path)


def append(descriptor: int, data: bytes) -> None:
    """Write to the end of an open file; part of it is there if this fails."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)


def overwrite(path: Path, start: int, data: memoryview) -> None:
    """Replace bytes of a file; `sync` it when all of them are written."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        while data:
            written = os.pwrite(descriptor, data, start)
            data, start = data[written:], start + written
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Return when what was written to a file, or the list of a folder's files, is on the disk.

    Some network file systems cannot be asked that of a folder: there it is theirs to keep the order of changes.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` a folder and all folders below it."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync(path)


def move(folder: Path, target: Path, aside: Path) -> None:
    """Rename a folder to `target`; what was there before is afterwards at `folder`, or at `aside`.

    Where the file system can exchange two names there is no moment at which `target` does not exist.
    """
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        os.rename(target, aside)
        os.rename(folder, target)
    sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or its file system has no such step (Linux: renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))
