"""An output folder that appears all at once, for writers that need no journal."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprune.checkpoint import durable
from llmprune.errors import CheckpointError


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out` that takes its place when the block ends, and is removed if the block fails.

    Raises:
        CheckpointError: the folder cannot be created or written.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"cannot create {out}: {error.strerror}") from None
    aside = partial.with_name(f"{partial.name}.replaced")
    try:
        partial.chmod(0o777 & ~_umask(partial))
        yield partial
        durable.move(partial, out, aside)
    except OSError as error:
        raise CheckpointError(f"cannot write {error.filename or out}: {error.strerror}") from None
    finally:
        for left in (partial, aside):  # the unfinished folder, or the one that was replaced
            shutil.rmtree(left, ignore_errors=True)


def _umask(folder: Path) -> int:
    """Return the bits that the system takes from new folders; temporary ones start out private."""
    probe = folder / "probe"
    probe.mkdir()
    mode = probe.stat().st_mode & 0o777
    probe.rmdir()
    return 0o777 & ~mode
