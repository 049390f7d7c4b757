"""How long a run takes on this machine, without reading and writing files."""

from collections.abc import Mapping, Sequence

import torch

from llmprune.forecast.dense import collected, dense_seconds
from llmprune.forecast.parts import Part, Workload
from llmprune.forecast.ranks import network_seconds, solving_share, statistic_of, statistics_share
from llmprune.forecast.yardstick import SolvingTime, solving_time, statistic_time, statistic_work
from llmprune.model import Outline
from llmprune.model.groups import Group, StatisticType
from llmprune.model.probe import Trial
from llmprune.planning import Plan
from llmprune.recipe import Recipe


def duration(
    host: Outline, plan: Plan, recipe: Recipe, workload: Workload | None, trials: Mapping[str, Trial], ranks: int
) -> list[Part]:
    """Return the parts of a run's time; see `memory` for the arguments."""
    method, stages = recipe.solver(), [trials[stage.name] for stage in plan.stages if stage.name in trials]
    towards = recipe.dense_target if any(trial.side_by_side for trial in stages) else 0.0
    times = solving_time(method, recipe.target(), host.dtype, host.device, towards)
    needs = collected(recipe)
    if workload is None or needs is None:
        return [
            solving_seconds([[Group([site]) for site in sites] for sites in plan.sites.values()], times, recipe, ranks)
        ]
    widest = max(site.shape[1] for site in plan.all_sites())
    each = statistic_time(needs, widest, workload.dtype, host.device)
    blocks = [trials[block.name] for block in host.blocks]
    parts = [
        *dense_seconds(host, recipe, workload, stages, widest),
        forward_seconds(stages, workload, blocks if workload.dense_stream else (), bool(recipe.tune_epochs)),
        statistics_seconds(stages, workload, needs, each, host.device),
        solving_seconds([trial.groups for trial in stages], times, recipe, ranks),
    ]
    if recipe.tune_epochs:
        parts.append(tuning_seconds([block for block in blocks if block.groups], workload, recipe.tune_epochs))
    return [*parts, network_seconds(plan, trials, workload, needs, host, recipe)] if ranks > 1 else parts


def forward_seconds(
    trials: Sequence[Trial], workload: Workload, dense: Sequence[Trial] = (), tuned: bool = False
) -> Part:
    """Return the time of all forwards: one or more to collect statistics, one with the pruned weights to go on.

    Collecting stops at the last input that is wanted. If it takes several runs, these stop all along the block: half
    a forward each on average. Lanes that are held side by side take one forward for all of it, and one more to go on
    from a block that is tuned then. The last block is not gone on from.

    Args:
        trials: of the stages.
        workload: of calibration.
        dense: trials of the blocks through which the sequences go in the dense model too, once each.
        tuned: whether blocks are tuned.
    """
    seconds = sum(_whole(trial, workload) * trial.seconds_per_flop for trial in dense)
    for index, trial in enumerate(trials):
        onward = _whole(trial, workload) if index + 1 < len(trials) else 0.0
        if trial.groups and trial.side_by_side and not tuned:
            onward = 0.0
        seconds += (_collecting(trial, workload) + onward) * trial.seconds_per_flop
    return Part("forward", seconds, "operations counted and timed here on a few tokens of one block of each kind")


def _whole(trial: Trial, workload: Workload) -> float:
    """Return the operations of a rank's forwards of its share of the sequences through a block."""
    return workload.share * workload.sequences * trial.forward_flops(workload.length)


def _collecting(trial: Trial, workload: Workload) -> float:
    """Return the operations of the forwards in which statistics are collected."""
    if not trial.groups:
        return 0.0
    whole = _whole(trial, workload)
    if trial.side_by_side:
        return whole
    return whole * (trial.runs + 1) / 2 if trial.runs > 1 else whole - workload.share * workload.tokens * _spared(trial)


def tuning_seconds(trials: Sequence[Trial], workload: Workload, epochs: int) -> Part:
    """Return the time of tuning: a forward, and a backward of twice its work, of each sequence in each epoch."""
    batches, _ = workload.step
    forwards = 3 * epochs * workload.sequences * workload.waited_for / batches
    seconds = sum(forwards * trial.forward_flops(workload.length) * trial.seconds_per_flop for trial in trials)
    return Part("tuning", seconds, "three forwards of each sequence in each epoch; more where smaller steps are tried")


def _spared(trial: Trial) -> float:
    """Return the operations per token of what is computed only after the last input has been seen."""
    if not trial.groups or any(group.calls is None for group in trial.groups):
        return 0.0
    return 2.0 * trial.fed[-1] * sum(site.numel for site in trial.groups[-1].sites)


def statistics_seconds(
    trials: Sequence[Trial],
    workload: Workload,
    needs: StatisticType,
    seconds_per_operation: float,
    device: torch.device,
) -> Part:
    """Return the time that summing the statistics takes."""
    work = 0.0
    for trial in trials:
        kind = statistic_of(needs, trial)
        whole = sum(
            fed * statistic_work(kind, group.inputs) for group, fed in zip(trial.groups, trial.fed, strict=True)
        )
        if workload.ranks > 1 and trial.groups:
            whole *= statistics_share(trial.groups, trial.fed, kind, device, workload)
        work += whole
    seconds = workload.tokens * work * seconds_per_operation
    return Part("statistics", seconds, "timed here on a sample, scaled by tokens and size")


def solving_seconds(stages: Sequence[Sequence[Group]], times: SolvingTime, recipe: Recipe, ranks: int) -> Part:
    """Return the time that solving all sites takes; with several ranks that of those which have the most to do."""
    if ranks == 1:
        seconds = sum(times.seconds([site.shape for site in group.sites]) for groups in stages for group in groups)
    else:
        seconds = sum(solving_share(groups, times, recipe, ranks) for groups in stages)
    return Part("solve", seconds, "four sample matrices timed here, scaled by their sizes")
