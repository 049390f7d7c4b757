"""What becomes of a stage once it is pruned: it stays in memory, or it is written, and recalled by a resumed run."""

from dataclasses import asdict
from typing import Any, Protocol

from llmprune.checkpoint import ALLOCATION, Sink
from llmprune.model import Streamed
from llmprune.model.sites import Site, Stage
from llmprune.report import Report, SiteReport


class Store(Protocol):
    """Takes the stages of a run in their order.

    Attributes:
        batch_size: sequences a forward, 0 as long as nobody has set it; a resumed run goes on with the same.
        allocation: what an earlier run that was interrupted has kept of it.
    """

    batch_size: int
    allocation: dict[str, Any] | None

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        """Take the allocation, plain values, for a resumed run to go on with."""

    def has(self, stage: Stage) -> bool:
        """Say whether the stage was kept before, be it by an earlier run that was interrupted."""

    def recall(self, stage: Stage) -> None:
        """Load a stage that was kept before, pruned as it is."""

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        """Take a pruned stage, which is loaded; the model runs on with it as it is."""

    def go_back(self) -> bool:
        """Forget what was done of a stage that was not kept; False if that is not possible."""


class InMemory:
    """For a loaded model: its stages stay where they are, and are never loaded again."""

    batch_size = 0
    allocation: dict[str, Any] | None = None

    def __init__(self) -> None:
        self._kept: set[str] = set()

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        pass

    def has(self, stage: Stage) -> bool:
        return stage.name in self._kept

    def recall(self, stage: Stage) -> None:
        pass

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        self._kept.add(stage.name)

    def go_back(self) -> bool:
        return False


class OnDisk:
    """For a streamed model: its stages go to a sink, whose journal also holds the report on each."""

    batch_size = 0
    allocation: dict[str, Any] | None = None

    def __init__(self, host: Streamed, sink: Sink, report: Report) -> None:
        self._host, self._sink, self._report = host, sink, report
        self._kept = set(sink.done)
        for record in sink.done.values():
            report.sites.extend(SiteReport.from_json(site) for site in record["sites"])
            report.clock.seconds.update(record["seconds"])
            report.most_runs, self.batch_size = record["runs"], record["batch_size"]
            self.allocation = record.get(ALLOCATION, self.allocation)
        self._reported = len(report.sites)

    def has(self, stage: Stage) -> bool:
        return stage.name in self._kept

    def recall(self, stage: Stage) -> None:
        self._host.load(stage, self._sink.copy)
        for name, weight in self._sink.aside(stage.name).items():
            self._host.model.get_parameter(name).data.copy_(weight)

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        for name, tensor in self._host.stored(stage, sites):
            self._sink.write(name, tensor)
        if self._host.rounds(stage):  # the run goes on with what was solved, and so must one that resumes it
            parameters = {site.tensor: self._host.model.get_parameter(site.tensor) for site in sites}
            self._sink.set_aside(stage.name, {name: parameter.data for name, parameter in parameters.items()})
        self._finish(stage.name)
        self._kept.add(stage.name)
        self._reported = len(self._report.sites)

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        self._finish(ALLOCATION, {ALLOCATION: allocation})

    def _finish(self, name: str, record: dict[str, Any] | None = None) -> None:
        reports = [asdict(site) for site in self._report.sites[self._reported :]]
        run = {"batch_size": self.batch_size, "runs": self._report.most_runs, "seconds": self._report.clock.seconds}
        self._sink.finish(name, {"sites": reports, **run, **(record or {})})

    def go_back(self) -> bool:
        del self._report.sites[self._reported :]
        return True
