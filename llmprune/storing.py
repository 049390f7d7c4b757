"""What becomes of a stage once it is pruned: it stays in memory, or it is written, and recalled by a resumed run."""

from dataclasses import asdict
from typing import Any, Protocol

import torch

from llmprune.checkpoint import ALLOCATION, Sink, Source
from llmprune.checkpoint.sink import difference
from llmprune.environment import hardware, versions
from llmprune.errors import RankError
from llmprune.model import Resident, Streamed
from llmprune.model.originals import Backup
from llmprune.model.sites import Site, Stage
from llmprune.report import Report, SiteReport
from llmprune.team.team import Team
from llmprune.tuning import BlockTuning

_DECISIVE = ("llmprune", "torch", "transformers", "triton")  # packages whose versions may change a result's bytes


class Store(Protocol):
    """Takes the stages of a run in their order.

    Attributes:
        batch_size: sequences a forward, 0 as long as nobody has set it; a resumed run goes on with the same.
    """

    batch_size: int

    def has(self, stage: Stage) -> bool:
        """Say whether the stage was kept before, be it by an earlier run that was interrupted."""

    def recall(self, stage: Stage) -> None:
        """Load a stage that was kept before, pruned as it is."""

    def begin(self, stage: Stage, sites: list[Site]) -> None:
        """Take note of a loaded stage, and of its sites that are about to be pruned."""

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        """Take a pruned stage, which is loaded; the model runs on with it as it is."""

    def go_back(self) -> bool:
        """Undo what was done of a stage that was not kept; False if the model cannot be run from its start again."""


class ResultStore(Store, Protocol):
    """Takes all that is to be kept of one result.

    Attributes:
        allocation: what an earlier run that was interrupted has kept of it.
    """

    allocation: dict[str, Any] | None

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        """Take the allocation, plain values, for a resumed run to go on with."""


class _Undoing:
    """What stores have in common: which stages are kept, and how the one at work is undone.

    Args:
        report: on the run; what it tells of stages that are not kept is taken back.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._backup = Backup(())  # of the stage at work
        self._kept: set[str] = set()
        self._reported = len(report.sites)  # of its sites, those of kept stages

    def has(self, stage: Stage) -> bool:
        return stage.name in self._kept

    def go_back(self) -> bool:
        self._backup.restore()
        del self._report.sites[self._reported :]
        self._report.tuning[:] = [block for block in self._report.tuning if block.block in self._kept]
        return True

    def _mark_kept(self, stage: Stage) -> None:
        self._kept.add(stage.name)
        self._reported = len(self._report.sites)


class InMemory(_Undoing):
    """For a loaded model: its stages stay where they are; the one at work is dense again if it cannot be finished.

    Args:
        host: the model.
        report: on the run.
        once: the dense model is run beside the pruned one, so that no block can be run again once it is pruned.
    """

    batch_size = 0
    allocation: dict[str, Any] | None = None

    def __init__(self, host: Resident, report: Report, once: bool) -> None:
        super().__init__(report)
        self._host, self._once = host, once

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        pass

    def recall(self, stage: Stage) -> None:
        pass

    def begin(self, stage: Stage, sites: list[Site]) -> None:
        vectors = stage.module.parameters() if self._report.recipe["tune_epochs"] else ()
        tuned = [parameter.data for parameter in vectors if parameter.ndim == 1]
        self._backup = Backup([*(self._host.weight(site) for site in sites), *tuned])

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        self._backup = Backup(())
        self._mark_kept(stage)

    def go_back(self) -> bool:
        super().go_back()
        return not (self._once and self._kept)


class OnDisk(_Undoing):
    """For a streamed model: its stages go to a sink, whose journal also holds the report on each."""

    batch_size = 0
    allocation: dict[str, Any] | None = None

    def __init__(self, host: Streamed, sink: Sink, report: Report) -> None:
        for record in sink.done.values():
            report.sites.extend(SiteReport.from_json(site) for site in record["sites"])
            report.tuning.extend(BlockTuning.from_json(block) for block in record["tuning"])
            report.clock.seconds.update(record["seconds"])
            report.memory.update(record["memory"])
            report.most_runs, self.batch_size = record["runs"], record["batch_size"]
            self.allocation = record.get(ALLOCATION, self.allocation)
            report.retries = record["retries"]
        super().__init__(report)
        self._host, self._sink = host, sink
        self._kept |= sink.done.keys()

    def recall(self, stage: Stage) -> None:
        self._host.load(stage, self._sink.copy)
        for name, weight in self._sink.aside(stage.name).items():
            self._host.model.get_parameter(name).data.copy_(weight)

    def begin(self, stage: Stage, sites: list[Site]) -> None:
        self._backup = Backup(self._host.weight(site) for site in sites if self._host.outlives(site))

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        names = list(dict.fromkeys([*(site.tensor for site in sites), *self._report.tuned_vectors(stage.name)]))
        self._sink.write_all(self._host.stored(stage, names))
        if self._host.rounds(stage):  # the run goes on with what was solved, and so must one that resumes it
            self._sink.set_aside(stage.name, {name: self._host.model.get_parameter(name).data for name in names})
        self._finish(stage)

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        self._note(ALLOCATION, {ALLOCATION: allocation})

    def _finish(self, stage: Stage) -> None:
        """Note that a stage is written, with what a resumed run has to know of it."""
        self._note(stage.name)
        self._mark_kept(stage)

    def _note(self, name: str, record: dict[str, Any] | None = None) -> None:
        reports = [asdict(site) for site in self._report.sites[self._reported :]]
        report = self._report
        tuning = [block.to_json() for block in report.tuning if block.block == name]
        run = {"runs": report.most_runs, "retries": report.retries, "seconds": report.clock.seconds}
        run["memory"] = {stage: used for stage, used in report.memory.items() if stage == name}
        known = {"sites": reports, "tuning": tuning, "batch_size": self.batch_size, **run}
        self._sink.finish(name, known | (record or {}))


class Beside(OnDisk):
    """For the ranks of a team that do not write: the first one does, and a resumed run reads what it has written."""

    def keep_allocation(self, allocation: dict[str, Any]) -> None:
        pass

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        self._mark_kept(stage)


def fingerprint(source: Source, report: Report, compressed: bool) -> dict[str, Any]:
    """Return all that decides the bytes of a run's result."""
    installed = versions()
    decisive: dict[str, Any] = {"compressed": True} if compressed else {}
    return decisive | {
        "recipe": report.recipe,
        "source": source.fingerprint(),
        "calibration": report.calibration,
        "versions": {package: installed[package] for package in _DECISIVE if package in installed},
        "hardware": hardware(),
        "arithmetic": {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "float32_products": _float32_products(),
        },
    }


def _float32_products() -> dict[str, str]:
    """Return the precision of products of float32; torch's older question for it fails where it was set the newer way."""
    backends = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}  # type: ignore[attr-defined]
    return {name: settings.fp32_precision.replace("none", "ieee") for name, settings in backends.items()}


def require_alike(team: Team, decisive: dict[str, Any]) -> None:
    """Raise RankError if a rank would work on something else, or otherwise; copies of the source may differ in age."""
    mine = {name: value for name, value in decisive.items() if name != "source"}
    mine["source"] = decisive["source"]["headers"]
    if found := difference(team.tell(mine), mine):
        raise RankError(f"rank {team.rank} has another {found} than rank 0: start all ranks alike")
