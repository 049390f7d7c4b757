"""A pass for several results: branches solve the same blocks, each in its own way, and none changes the model."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmprune.branch import SOLVE, Branch
from llmprune.checkpoint import Sink
from llmprune.model import Streamed
from llmprune.model.groups import Group
from llmprune.model.sites import Site, Stage
from llmprune.planning import Plan
from llmprune.report import Report
from llmprune.run import Run
from llmprune.storing import OnDisk, Store


class OnBranch(OnDisk):
    """Takes the matrices of one branch, which are copies of the model's, and writes each when it is solved.

    A tensor that holds several matrices, such as fused experts, waits until all of them are.

    Args:
        shared: the report of the pass, which counts its time and memory.
    """

    def __init__(self, host: Streamed, plan: Plan, sink: Sink, report: Report, shared: Report) -> None:
        super().__init__(host, sink, report)
        stages = {stage.name: stage for stage in [host.embedding, *host.blocks, host.head]}
        self._stage_of = {site.tensor: stages[name] for name, sites in plan.sites.items() for site in sites}
        self._matrices = Counter(site.tensor for site in plan.all_sites())
        self._own: dict[str, Tensor] = {}
        self._unsolved: dict[str, int] = {}
        self._shared = shared
        shared.clock.seconds |= {name: took for name, took in report.clock.seconds.items() if name != SOLVE}
        shared.memory |= report.memory
        shared.most_runs = max(shared.most_runs, report.most_runs)
        shared.retries.extend(retry for retry in report.retries if retry not in shared.retries)
        report.memory, report.retries = shared.memory, shared.retries

    def weight(self, site: Site) -> Tensor:
        """Return the branch's own matrix [outputs, inputs], dense until it is overwritten."""
        if site.tensor not in self._own:
            self._own[site.tensor] = site.module.get_parameter(site.parameter).data.clone()
            self._unsolved[site.tensor] = self._matrices[site.tensor]
        return site.view(self._own[site.tensor])

    def solved(self, site: Site) -> None:
        """Write the tensor of a site if this was the last of its matrices."""
        self._unsolved[site.tensor] -= 1
        if not self._unsolved[site.tensor]:
            with self._shared.clock.phase("write"):
                self._write(site)

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        for site in sites:
            if site.tensor in self._own:
                self._write(site)
        self._report.most_runs = self._shared.most_runs
        self._report.clock.seconds |= self._shared.clock.seconds
        self._finish(stage)

    def go_back(self) -> bool:
        self._own.clear()
        return super().go_back()

    def _write(self, site: Site) -> None:
        parameter = site.module.get_parameter(site.parameter)
        dense, parameter.data = parameter.data, self._own.pop(site.tensor)
        try:
            for name, tensor in self._host.stored(self._stage_of[site.tensor], [site.tensor]):
                self._sink.write(name, tensor)
        finally:
            parameter.data = dense


class BesideBranch(OnBranch):
    """For the ranks of a team that do not write: they let go of a matrix where the first one writes it."""

    def _write(self, site: Site) -> None:
        del self._own[site.tensor]

    def _note(self, name: str, record: dict[str, Any] | None = None) -> None:
        pass


class Branches:
    """The store of a pass: a stage is kept when every branch has kept it, and is always recalled as it was."""

    def __init__(self, host: Streamed, stores: Sequence[Store]) -> None:
        self._host, self._stores = host, stores

    @property
    def batch_size(self) -> int:
        return max(store.batch_size for store in self._stores)

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        for store in self._stores:
            store.batch_size = size

    def has(self, stage: Stage) -> bool:
        return all(store.has(stage) for store in self._stores)

    def recall(self, stage: Stage) -> None:
        self._host.load(stage)

    def begin(self, stage: Stage, sites: list[Site]) -> None:
        """Nothing to take note of: the model stays as it is."""

    def keep(self, stage: Stage, sites: list[Site]) -> None:
        for store in self._stores:
            if not store.has(stage):
                store.keep(stage, sites)

    def go_back(self) -> bool:
        return all([store.go_back() for store in self._stores])


@dataclass(frozen=True)
class Pass(Run):
    """A run through the dense model for several results, whose matrices are copies of the model's.

    With several ranks those that a rank has solved of a stage wait for its end.
    """

    def prune(self) -> None:
        super().prune()
        self.report.close(self.plan)
        for branch in self.branches:
            branch.report.clock.seconds |= self.report.clock.seconds
            branch.report.notes.extend(note for note in self.report.notes if note not in branch.report.notes)

    def _settle(self) -> None:
        """Nothing to bring: the blocks are run as they are."""

    def _solve(self, stage: Stage, groups: Iterable[Group]) -> None:
        before = [_solving(branch) for branch in self.branches]
        super()._solve(stage, groups)
        self._add_up(before)

    def _add_up(self, before: Sequence[float]) -> None:
        """Let the time that each branch has solved since `before`, its time then, be the sum over all ranks."""
        took = self.team.gather([_solving(branch) - then for branch, then in zip(self.branches, before, strict=True)])
        for branch, then, *of_ranks in zip(self.branches, before, *took, strict=True):
            branch.report.clock.seconds[SOLVE] = then + sum(of_ranks)


def _solving(branch: Branch) -> float:
    """Return the seconds that were needed to solve."""
    return branch.report.clock.seconds.get(SOLVE, 0.0)
