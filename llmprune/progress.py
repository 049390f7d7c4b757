"""Progress bars on stderr: what is being done, how far it is, time left, memory in use."""

from types import TracebackType

import psutil
from tqdm import tqdm

from llmprune.team.launch import launch

GIB = 2**30


def size_text(size: float) -> str:
    """Return a number of bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def resident_bytes() -> int:
    """Return the memory that this process occupies now, in bytes."""
    return int(psutil.Process().memory_info().rss)


class Progress:
    """A bar of `total` steps that also shows memory; silent without a terminal, and on all ranks but one."""

    def __init__(self, total: int, description: str, unit: str) -> None:
        silent = launch().rank > 0 or None  # None: where stderr is not a terminal
        self._bar: tqdm = tqdm(total=total, desc=description, unit=unit, disable=silent, dynamic_ncols=True)  # type: ignore[type-arg]

    def step(self, count: int = 1) -> None:
        """Move the bar on by `count` steps."""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{resident_bytes() / GIB:.2f} GiB", refresh=False)
        self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
