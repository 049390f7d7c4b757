"""Who solves which matrix: each is solved by one rank of the team, and handed to the others before they need it."""

from collections.abc import Callable

from torch import Tensor

from llmprune.methods import Method
from llmprune.model.sites import Site
from llmprune.planning import Plan
from llmprune.report import Report, SiteReport
from llmprune.statistics import Gram
from llmprune.team.team import Team, deal

Loads = dict[str, list[float]]  # what each rank has to do, by stage


class Portions:
    """Deals the matrices of each stage out to the ranks of a team by what they cost.

    Args:
        team: the ranks.
        weight: returns a site's matrix, which is overwritten on all ranks.
        plan: the stages and their sites.
        method: solves them.
        report: takes the reports on the sites, in the order in which they were solved.
        loads: what was dealt out before; is added to.
        arrived: is called on all ranks with each site whose solution is there.
    """

    def __init__(
        self,
        team: Team,
        weight: Callable[[Site], Tensor],
        plan: Plan,
        method: Method,
        report: Report,
        loads: Loads | None = None,
        arrived: Callable[[Site], None] = lambda site: None,
    ) -> None:
        self._team, self._weight, self._report, self._arrived = team, weight, report, arrived
        self._owners: dict[str, int] = {}
        loads = {} if loads is None else loads
        for stage, sites in plan.sites.items():
            load = loads.setdefault(stage, [0.0] * team.size)
            owners = deal([_cost(method, *site.shape) for site in sites], load)
            self._owners |= {site.name: owner for site, owner in zip(sites, owners, strict=True)}
        self._pending: list[tuple[Site, SiteReport | None]] = []

    def take(self, site: Site, solve: Callable[[], SiteReport]) -> None:
        """Solve a matrix, if it is this rank's."""
        self._pending.append((site, solve() if self._owners[site.name] == self._team.rank else None))
        if self._team.size == 1:
            self.settle()

    def settle(self) -> None:
        """Bring all matrices that were taken since the last time to all ranks."""
        if not self._pending:
            return
        solved = self._team.gather([report for _, report in self._pending])
        for place, (site, _) in enumerate(self._pending):
            owner = self._owners[site.name]
            self._team.hand(self._weight(site), owner)
            report = solved[owner][place]
            assert report is not None
            self._report.sites.append(report)
            self._arrived(site)
        self.forget()

    def forget(self) -> None:
        """Let go of what was taken and not settled, as it will be solved anew."""
        self._pending.clear()


def _cost(method: Method, outputs: int, inputs: int) -> float:
    """Return the operations that solving takes, up to a factor: a factor of the Gram matrix, and a sweep over it."""
    return float(inputs * inputs * (inputs + outputs) if method.needs is Gram else inputs * outputs)
