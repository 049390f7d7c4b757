"""One result of a run: which pattern each of its sites gets, and how its matrices are solved, each by one rank."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from llmprune.budget import Chooser
from llmprune.methods.magnitude import Magnitude
from llmprune.model.groups import Group
from llmprune.model.memory import out_of_memory_in
from llmprune.model.sites import Site
from llmprune.patterns import Pattern
from llmprune.planning import Plan
from llmprune.portions import Loads, Portions
from llmprune.recipe import Recipe
from llmprune.report import Report, SiteReport
from llmprune.solving import prune_matrix
from llmprune.storing import ResultStore
from llmprune.team.team import Team
from llmprune.thrift import SolvingError, Thrift

SOLVE = "solve"  # the phase whose time each branch counts for itself; several may share all others


@dataclass
class Branch:
    """One result of a run. A run has one, which solves the model's own matrices; one pass for several results has more.

    Attributes:
        recipe: what the user asked for.
        plan: the stages and their sites.
        report: filled on the way.
        store: takes pruned stages, and knows those of an earlier run that was interrupted.
        weight: returns the matrix of a site, which is overwritten.
        thrift: what is given up where memory runs out.
        team: the processes that share the work.
        loads, arrived: see `Portions`.
        portions: who solves which matrix.
        patterns: of every site, by name; from `choose` on.
    """

    recipe: Recipe
    plan: Plan
    report: Report
    store: ResultStore
    weight: Callable[[Site], Tensor]
    thrift: Thrift = field(default_factory=Thrift)
    team: Team = field(default_factory=Team)
    loads: Loads = field(default_factory=dict)
    arrived: Callable[[Site], None] = lambda site: None
    portions: Portions = field(init=False)
    patterns: dict[str, Pattern] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        method = self.recipe.solver()
        self.portions = Portions(self.team, self.weight, self.plan, method, self.report, self.loads, self.arrived)

    def choose(self, chooser: Chooser) -> None:
        """Choose every site's pattern, the same on all ranks."""
        known = self.store.allocation
        self.team.at("the allocation of sparsity")
        with self.report.clock.phase("allocation") if self.recipe.allocation != "uniform" else nullcontext():
            choice = chooser.choose(self.plan, self.recipe, known)
        self.report.allocation = choice.told
        if choice.allocation and not known:
            self.store.keep_allocation(choice.allocation)
        self.patterns = choice.patterns

    def solve(self, group: Group) -> None:
        """Solve the sites of a group, as far as they are this rank's."""
        for site in group.sites:
            self.portions.take(site, partial(self.solve_site, site, group))

    def solve_site(self, site: Site, group: Group) -> SiteReport:
        """Overwrite a site's matrix with its solution, and return the report on it."""
        method, pattern, weight_OI = self.recipe.at(site.tensor).solver(), self.patterns[site.name], self.weight(site)
        if group.statistic is None and method.needs is not None:
            method = Magnitude()  # experts that no token reached; the group's notes say so
        seed, towards, on_host = self.recipe.seed, self.recipe.dense_target, self.thrift.on_host
        with self.report.clock.phase(SOLVE), out_of_memory_in(site.name, SolvingError):
            outcome = prune_matrix(site.name, method, weight_OI, group.statistic, pattern, seed, towards, on_host)
        return SiteReport.of(site, outcome, pattern, group.statistic, group.notes)

    def close(self) -> None:
        """End the report, with the most memory that any of the ranks needed."""
        self.report.close(self.plan)
        peaks = self.team.gather(self.report.peak)
        self.report.peak = {on: max(peak[on] for peak in peaks) for on in self.report.peak}
