"""What pruning a site alone does to its outputs, at a few sparsities: solved by the run's own method, cut short.

Curves of a weaker method mislead: they make sites look hard that the run's method prunes well. So the method is the
run's, and cheap by other means: few points, some rows of each matrix, all sites of a group and all points solved as one
matrix, so that they share their factorisations, and few iterations where a method has many.

Shape suffixes: O outputs, I inputs, P points of a curve, R sampled outputs, S outputs of stacked matrices.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from llmprune.errors import naming
from llmprune.methods import Method
from llmprune.model.groups import Group, is_starved
from llmprune.model.sites import Site, require_finite
from llmprune.patterns import Count, Stacked
from llmprune.statistics import Gram

_CUT_SHORT = {"iterations": 3, "stages": 1, "refit": 1}  # the most of such hyper-parameters, of whatever method
SAMPLED_ROWS = 256  # of a matrix that are solved at most
_STACKED = 1 << 26  # weights that are solved at once

Solver = Callable[[Site], tuple[Method, Callable[[int, int], Count]]]


@dataclass(frozen=True)
class Trials:
    """What is to be solved of every site.

    Attributes:
        solver: returns the method of a site, and what makes its pattern from the number of removed weights and of all.
        shares: the points.
    """

    solver: Solver
    shares: Sequence[float]


@dataclass(frozen=True)
class Loss:
    """What pruning a site alone does, told from some of its outputs.

    Attributes:
        error_PR: squared change of each of the `sampled` outputs, summed over all tokens, at every point.
        energy: squares of these outputs, summed over them and the tokens.
    """

    error_PR: Tensor
    energy: float


@dataclass(frozen=True)
class _Job:
    """The sampled rows of a matrix, to be solved at one point."""

    site: Site
    weight_RI: Tensor
    pattern: Count
    method: Method


def sampled(rows: Tensor) -> Tensor:
    """Return the rows that stand for all of a matrix, or for what is known of each: 256 at most, evenly spaced.

    By an odd step, as heads have even widths, and rows at the same place of each head are alike.
    """
    step = math.ceil(len(rows) / SAMPLED_ROWS)
    return rows[:: step | 1 if step > 2 else step]


def losses(
    groups: Iterable[Group],
    weight: Callable[[Site], Tensor],
    several: Sequence[Trials],
    seed: int,
    takes: Callable[[Group], bool] = lambda group: True,
) -> list[dict[str, Loss]]:
    """Return the loss of every site of the groups, by its name: one such table for each of `several` trials.

    Sites that no input has reached are left out. Trials are solved one by one, so that none depends on the others.

    Args:
        groups: whose statistics are let go of once they are used.
        weight: returns a site's matrix.
        several: the trials, one for each sparsity of the whole model that is planned for.
        seed: of methods that draw random numbers.
        takes: says whether this process solves a group; those that it does not are left out.
    """
    found = [dict[str, Loss]() for _ in several]
    for group in groups:
        if isinstance(group.statistic, Gram):
            if takes(group) and group.tokens:  # an expert without tokens has but what its fellows have seen
                for trials, losses_so_far in zip(several, found, strict=True):
                    losses_so_far |= _of_group(group, group.statistic, weight, trials, seed)
                group.statistic.forget_factors()
            group.statistic = None
    return found


def _of_group(group: Group, gram: Gram, weight: Callable[[Site], Tensor], trials: Trials, seed: int) -> dict[str, Loss]:
    jobs, energies = [], {}
    # A Gram is a mean over sequences, that of an expert which was shrunk a mean over tokens: this makes it a sum again.
    count = gram.tokens if is_starved(group) else gram.sequences
    for site in group.sites:
        method, pattern_of = trials.solver(site)
        weight_RI = sampled(weight(site)).to(gram.device).float()
        energies[site] = count * gram.energy(weight_RI)
        size = weight_RI.numel()
        jobs += [
            _Job(site, weight_RI, pattern_of(int(size * share), size), cut_short(method)) for share in trials.shares
        ]
    errors: dict[Site, list[Tensor]] = {site: [] for site in group.sites}
    for batch in _batches(jobs):
        weight_SI = torch.cat([job.weight_RI for job in batch])
        heights = tuple(len(job.weight_RI) for job in batch)
        pattern = Stacked(tuple(job.pattern for job in batch), heights)
        method, generator = batch[0].method, torch.Generator().manual_seed(seed)
        trial = f"a trial solution of {batch[0].site.name}"
        with naming(trial):
            solution = method.solve(weight_SI, gram, pattern, generator)
        require_finite(trial, solution.weight_OI)
        change_S = solution.change_O
        energy_S = gram.energy_O(weight_SI - solution.weight_OI) if change_S is None else change_S
        error_S = (energy_S * count).cpu()
        for job, error_R in zip(batch, error_S.split(heights), strict=True):
            errors[job.site].append(error_R)
    return {site.name: Loss(torch.stack(errors[site]), energies[site]) for site in group.sites}


def _batches(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Yield jobs that are solved as one: those of one method, if it works from a Gram and so treats rows alike."""
    batch: list[_Job] = []
    for job in jobs:
        size = sum(held.weight_RI.numel() for held in batch) + job.weight_RI.numel()
        if batch and (job.method != batch[0].method or job.method.needs is not Gram or size > _STACKED):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def cut_short(method: Method) -> Method:
    """Return the method with less to do, where it has an option for that."""
    assert is_dataclass(method)
    fewer = {
        option.name: min(getattr(method, option.name), _CUT_SHORT[option.name])
        for option in fields(method)
        if option.name in _CUT_SHORT
    }
    shorter: Method = replace(method, **fewer)
    return shorter
