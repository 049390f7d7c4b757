"""The journal of a run: what of it is on the disk for good, line by line, and which process is at work."""

import fcntl
import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

from llmprune.checkpoint import durable
from llmprune.errors import CheckpointError

Record = dict[str, Any]

_log = logging.getLogger(__name__)


class Journal:
    """Append-only JSON lines. A line that `append` has returned from survives a crash; a torn last line is dropped.

    The file is locked while it is open. The system lets go of the lock when the process dies, so none is ever stale.
    Where a file system has no locks, as Lustre often, a warning says so.

    Raises:
        CheckpointError: another process holds the journal, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from None
        try:
            self._lock()
            self.records = self._read()
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Add a line and return when it is on the disk."""
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        durable.append(self._file.fileno(), text.encode() + b"\n")
        self.records.append(record)

    def clear(self) -> None:
        """Forget everything."""
        self._file.truncate(0)
        self.records.clear()

    def close(self) -> None:
        """Let go of the file and its lock."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in durable.UNSUPPORTED:
                _log.warning("%s has no locks: see to it that no other run writes there", self.path.parent)
                return
            raise CheckpointError(
                f"another run{self._owner()} is writing {self.path.parent}: wait for it, or choose another output"
            ) from None
        if not self.path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
            raise CheckpointError(f"another run has just finished at {self.path.parent}: try again")

    def _owner(self) -> str:
        """Return who wrote the last line that says so, in words."""
        records, _ = self._lines()
        owners = [record["by"] for record in records if "by" in record]
        return f" ({owners[-1]})" if owners else ""

    def _read(self) -> list[Record]:
        """Return the records and cut off what a crash left of a last one."""
        records, length = self._lines()
        self._file.truncate(length)
        return records

    def _lines(self) -> tuple[list[Record], int]:
        """Return the records and the bytes that they take."""
        self._file.seek(0)
        lines, records, length = self._file.readlines(), list[Record](), 0
        for number, line in enumerate(lines, start=1):
            record = _record(line)
            if record is not None:
                records.append(record)
                length += len(line)
            elif number < len(lines):
                raise CheckpointError(f"{self.path} is damaged in line {number}: delete its folder to start anew")
        return records, length


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def this_process() -> str:
    """Return what tells this process from others, in words."""
    return f"process {os.getpid()} on {socket.gethostname()}"
