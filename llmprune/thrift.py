"""Memory that runs out during a run: what is given up, step by step, until it suffices."""

import logging
from dataclasses import dataclass, field

from llmprune.errors import ResourceError
from llmprune.model.collect import Collector
from llmprune.progress import size_text
from llmprune.report import Report
from llmprune.storing import Store

_SHRINK = 4  # by how much the statistics that are held at once shrink in one step

_log = logging.getLogger(__name__)


class SolvingError(ResourceError):
    """Memory ran out while a matrix was solved."""


@dataclass
class Thrift:
    """What a run has given up so far; it stays so to the end of the run.

    Attributes:
        budget: bytes that the statistics of a block may take at once; None for as many as the machine has room for.
        side_by_side: whether all batches may be held within a block at once.
        on_host: whether a matrix may be solved on the host where the GPU has no room.
        collector: the one at work, which knows what there is to give up.
    """

    budget: int | None = None
    side_by_side: bool = True
    on_host: bool = False
    collector: Collector | None = field(default=None, init=False)

    def retry(self, error: ResourceError, store: Store, report: Report, has_gpu: bool) -> None:
        """Go back to the start of the stage at work and give up the next thing; raise `error` where that cannot be."""
        step = self.give_up(error, store, has_gpu) if store.go_back() else None
        if step is None:
            raise error
        said = str(error)  # not the error itself, from whose traceback all that took the memory hangs
        report.retries.append(f"{said.partition(': ')[0]}: {step}")
        _log.warning("%s; %s", said, step)

    def give_up(self, error: ResourceError, store: Store, has_gpu: bool) -> str | None:
        """Give up the next thing, and return in words how the run goes on; None where nothing is left.

        Batches that are too large for a forward are halved first: their results differ by rounding only, but for block
        tuning, which shuffles and holds out whole batches. Statistics collected in several runs, and blocks run once for
        each matrix, are the same to the bit.
        """
        solving, collector = isinstance(error, SolvingError), self.collector
        if collector and collector.walked:
            self.side_by_side = False
            return "running each block once for every matrix"
        if not solving and store.batch_size > 1:
            store.batch_size //= 2
            return f"going on with {store.batch_size} sequences a forward"
        if collector and collector.together:
            self.budget = collector.together // _SHRINK
            return f"collecting statistics of {size_text(self.budget)} at a time"
        if solving and has_gpu and not self.on_host:
            self.on_host = True
            return "solving on the host what the GPU has no room for"
        return None
