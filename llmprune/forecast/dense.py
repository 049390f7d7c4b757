"""What the passes of the dense model need: those that share out a sparsity, and those that bring gradients."""

import math
from collections.abc import Sequence

import torch

from llmprune.budget.curves import SAMPLED_ROWS, cut_short
from llmprune.budget.dense import MOST_FOLLOWED, MOST_SEQUENCES, POINTS
from llmprune.forecast.parts import Part, Workload
from llmprune.forecast.ranks import statistics_share
from llmprune.forecast.yardstick import SolvingTime, solving_time, statistic_time, statistic_work
from llmprune.model import Outline
from llmprune.model.groups import Group, StatisticType
from llmprune.model.memory import hidden_size, room_for_blocks
from llmprune.model.probe import Trial
from llmprune.recipe import Recipe
from llmprune.statistics import ColumnNorm, CrossGram, Gradient, Gram
from llmprune.team.team import deal

_BACKWARD = 3  # forwards that a block's second run and its backward take


def collected(recipe: Recipe) -> StatisticType | None:
    """Return the statistic that calibration collects, or one that takes as much where that is a gradient."""
    if recipe.dense_target:
        return CrossGram
    needs = recipe.needs or (Gram if recipe.calibrates else None)
    return ColumnNorm if needs is Gradient else needs


def dense_seconds(
    host: Outline, recipe: Recipe, workload: Workload, trials: Sequence[Trial], widest: int
) -> list[Part]:
    """Return the time of the passes that a recipe adds to a run."""
    sequences, ranks = min(MOST_SEQUENCES, workload.sequences), workload.ranks
    forward = sum(_forwards(trial) * trial.forward_flops(workload.length) * trial.seconds_per_flop for trial in trials)
    back = sum(trial.forward_flops(workload.length) * trial.plain_seconds_per_flop for trial in trials)
    if recipe.needs is Gradient:
        seconds = _BACKWARD * back * math.ceil(workload.sequences / ranks)
        return [Part("gradients", seconds, "a forward timed here, and what a backward usually takes of it")]
    if not recipe.measures_costs:
        return []
    each = statistic_time(Gram, widest, workload.dtype, host.device)
    seconds = forward * math.ceil(sequences / ranks)
    if recipe.allocation == "fisher":
        seconds += _BACKWARD * back * math.ceil(min(MOST_FOLLOWED, sequences) / ranks)
    for trial in trials:
        work = [fed * statistic_work(Gram, group.inputs) for group, fed in zip(trial.groups, trial.fed, strict=True)]
        share = statistics_share(trial.groups, trial.fed, Gram, host.device, workload) if work else 0.0
        seconds += sequences * workload.length * sum(work) * each * share
    if recipe.allocation != "owl":
        times = solving_time(cut_short(recipe.solver()), recipe.target(), host.dtype, host.device)
        seconds += sum(_solving(trial.groups, times, ranks) for trial in trials)
    return [Part("allocation", seconds, f"at most {MOST_SEQUENCES} sequences, as what follows")]


def _forwards(trial: Trial) -> int:
    """Return how often a block is run: experts once to see their inputs, and once to go on from."""
    return 2 if any(group.of_expert for group in trial.groups) else 1


def _solving(groups: Sequence[Group], times: SolvingTime, ranks: int) -> float:
    """Return the seconds that the rank with the most to do takes to solve the points of a block's curves."""
    shapes = [[(POINTS * min(SAMPLED_ROWS, site.shape[0]), site.shape[1]) for site in group.sites] for group in groups]
    load = [0.0] * ranks
    deal([times.seconds(of_group) for of_group in shapes], load)
    return max(load)


def follows_gradients(recipe: Recipe) -> bool:
    """Say whether a run goes backward through the dense model."""
    return recipe.allocation == "fisher" or recipe.needs is Gradient


def kept_memory(host: Outline, recipe: Recipe, workload: Workload) -> list[Part]:
    """Return what the hidden states before every block take, which gradients need; a run takes fewer if they do not fit."""
    if not follows_gradients(recipe):
        return []
    sequences = workload.sequences if recipe.needs is Gradient else min(MOST_FOLLOWED, workload.sequences)
    mine = math.ceil(sequences / workload.ranks)
    amount = len(host.blocks) * mine * workload.length * hidden_size(host.config) * host.dtype.itemsize
    return [Part("hidden states of all blocks", amount, f"for gradients, {mine} sequences at most")]


def kept_blocks(host: Outline, recipe: Recipe) -> list[Part]:
    """Return what blocks take that stay on a GPU once an allocation has seen them, so that each is read only once."""
    if not recipe.measures_costs:
        return []
    amount = min(room_for_blocks(host.device), sum(map(host.bytes_of, host.blocks)))
    return [Part("blocks to come", amount, "as far as they fit, so that each is read once", "device")] if amount else []


def backward_memory(host: Outline, recipe: Recipe, workload: Workload, on: str) -> list[Part]:
    """Return what it takes to set out backward: the last block, the head, and what comes of a sequence's logits.

    These are there in the model's dtype, and in fp32 as probabilities, beside which are first the logits in fp32, if
    they were not, and then the sums from which labels are drawn, if they are.
    """
    vocabulary = getattr(host.config.get_text_config(), "vocab_size", 0)
    copies = 2 if recipe.allocation == "fisher" or host.dtype != torch.float32 else 1
    amount = workload.length * vocabulary * (host.dtype.itemsize + copies * torch.float32.itemsize)
    return [
        Part("one block", host.bytes_of(host.blocks[-1]), f"parameters of {host.blocks[-1].name}", on),
        Part("head", host.bytes_of(host.head), f"parameters of {host.head.name}", on),
        Part("predictions", amount, f"of {workload.length} tokens, of {vocabulary} labels each", on),
    ]
