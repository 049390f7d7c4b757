"""Signs of life: every rank leaves one in the store of the launcher twice a second, and reads those of the others.

A collective operation of torch.distributed says that it failed or hangs, but not who is to blame. The signs say that:
who has stopped giving them, and what the last words were of a rank that left because of an error. As ranks go through
the model in step, the block at which one waits for another is that at which the other is lost.
"""

import json
import threading
import time
from typing import Any, NamedTuple

_BEAT = 0.5  # seconds between signs of life
_INQUEST = 6.0  # seconds to find out who is to blame for a broken connection
_MISSED = 3.0  # seconds without a sign that then are suspicious
_FAREWELL = 2.0  # seconds that the last sign may take


class Sign(NamedTuple):
    """A sign of life: its number, and once a rank has left why: "" if all is well."""

    beat: int = 0
    left: str | None = None


class Watch:
    """Gives and reads signs of life in a thread of its own until `leave`.

    Args:
        store: that all ranks share. A copy is used: a request that waits in one thread holds up those of others.
        rank, size: this process's number, and how many there are.
        patience: seconds without a sign after which a rank is lost.
    """

    def __init__(self, store: Any, rank: int, size: int, patience: float) -> None:
        self._store, self._rank, self._patience = store.clone(), rank, patience
        self._keys = [f"rank/{number}" for number in range(size)]
        self._sign, self._place = Sign(), "the start"
        self._heard = [(Sign(), time.monotonic()) for _ in range(size)]
        self._answered = time.monotonic()
        self._leaving = threading.Event()
        self._give()
        store.wait(self._keys)
        self._thread = threading.Thread(target=self._run, name="llmprune-watch", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Note what this rank is working on."""
        self._place = place

    def leave(self, why: str = "") -> None:
        """Give the last sign: that the work is done, or why it is not."""
        self._sign = self._sign._replace(left=why)
        self._leaving.set()
        self._thread.join(_FAREWELL)

    def lost(self, patience: float | None = None) -> str | None:
        """Return who is lost, where, and how it shows; None if all ranks are well or done."""
        patience, now = patience or self._patience, time.monotonic()
        for sign, _ in self._heard:
            if sign.left:
                return sign.left
        if now - self._answered > patience:
            return f"rank 0 cannot be reached from rank {self._rank} in {self._place}"
        silent = {number: self._answered - at for number, (sign, at) in enumerate(self._heard) if sign.left is None}
        longest = max(silent, key=lambda number: silent[number], default=self._rank)
        if longest == self._rank or silent[longest] <= patience:
            return None
        return f"rank {longest} was lost in {self._place}, without a sign of life for {silent[longest]:.0f} s"

    def blame(self) -> str | None:
        """Return who is lost now that a connection has broken; waits until it shows."""
        until = time.monotonic() + _INQUEST
        while time.monotonic() < until:
            if who := self.lost(min(_MISSED, self._patience)):
                return who
            time.sleep(_BEAT / 5)
        return None

    def last_words(self, error: BaseException) -> str:
        """Return the last words of a rank that an error ends."""
        return f"rank {self._rank} stopped in {self._place}: {error or type(error).__name__}"

    def _run(self) -> None:
        try:
            while not self._leaving.wait(_BEAT):
                self._give()
                self._hear()
            self._give()
        except RuntimeError:  # the store is gone; `lost` tells by the time since it has answered
            return

    def _give(self) -> None:
        self._sign = self._sign._replace(beat=self._sign.beat + 1)
        self._store.set(self._keys[self._rank], json.dumps(self._sign))

    def _hear(self) -> None:
        signs = [Sign(*json.loads(text)) for text in self._store.multi_get(self._keys)]
        now = time.monotonic()
        self._heard = [
            (sign, now) if sign != before else (before, at)
            for sign, (before, at) in zip(signs, self._heard, strict=True)
        ]
        self._answered = now
