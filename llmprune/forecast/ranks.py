"""What the work costs each of several ranks: what is dealt out, what is not, and what goes over the network.

See `llmprune/model/tally.py` for who does what.
"""

from collections.abc import Mapping, Sequence

import torch

from llmprune.budget.dense import MOST_FOLLOWED, MOST_SEQUENCES
from llmprune.forecast.parts import Part, Workload
from llmprune.forecast.yardstick import SolvingTime, statistic_work
from llmprune.model import Outline
from llmprune.model.groups import Group, StatisticType
from llmprune.model.probe import Trial, without_dense
from llmprune.planning import Plan
from llmprune.recipe import Recipe
from llmprune.statistics import ColumnNorm, CrossGram, Gradient, Gram
from llmprune.team.parcels import most_bytes
from llmprune.team.team import deal

NETWORK = 1.25e9  # bytes a second: 10 Gbit/s


def statistic_of(needs: StatisticType, trial: Trial) -> StatisticType:
    """Return the statistic of a stage: inputs of the dense model come where lanes are held side by side."""
    return needs if trial.side_by_side else without_dense(needs)


def handed_memory(trial: Trial, workload: Workload, needs: StatisticType, host: Outline, on: str) -> list[Part]:
    """Return what a rank holds to hand round: the inputs of its batch and of others', and the sums that it has made."""
    needs = statistic_of(needs, trial)
    row = sum(group.inputs * fed for group, fed in zip(trial.groups, trial.fed, strict=True)) * workload.dtype.itemsize
    size = 0 if needs is ColumnNorm else int(_fed_in(needs) * workload.tokens_at_once * row)
    handed = most_bytes(size, workload.ranks) if size else 0
    sums = max(_dealt_bytes(needs, group.inputs, host.device, workload) for group in trial.groups)
    return [
        Part("inputs handed round", handed, "copies of a batch's inputs, and what comes from other ranks", on),
        Part("sums handed round", sums, "a rank's share of the widest Gram matrix, in one buffer", on),
    ]


def statistics_share(
    groups: Sequence[Group], fed: Sequence[float], needs: StatisticType, device: torch.device, workload: Workload
) -> float:
    """Return the largest share of the work of the statistics that a rank has."""
    work = [part * statistic_work(needs, group.inputs) for group, part in zip(groups, fed, strict=True)]
    if needs is ColumnNorm or _in_tiles(device, workload):
        return 1 / workload.ranks
    load = [0.0] * workload.ranks
    for one in work:
        deal([one], load)
    return max(load) / max(sum(work), 1e-9)


def solving_share(groups: Sequence[Group], times: SolvingTime, recipe: Recipe, ranks: int) -> float:
    """Return the seconds that a block's matrices take the rank that has the most of them."""
    sites = [site for group in groups for site in group.sites]
    if recipe.true_sequential and not any(site.of_expert for site in sites):
        return sum(times.seconds([site.shape]) for site in sites)  # each waits for the one before it
    load = [0.0] * ranks
    deal([times.seconds([site.shape]) for site in sites], load)
    return max(load)


def network_seconds(
    plan: Plan, trials: Mapping[str, Trial], workload: Workload, needs: StatisticType, host: Outline, recipe: Recipe
) -> Part:
    """Return the time that all exchanges take at `NETWORK`."""
    others = 1 - 1 / workload.ranks
    inputs, sums = _fed_bytes([trials[stage.name] for stage in plan.stages], workload.sequences, needs, workload)
    weights = sum(site.numel for site in plan.all_sites())
    gradients = weights * _gradient_bytes(recipe, workload, host)
    dense = _allocation_bytes([trials[block.name] for block in host.blocks], workload, recipe)
    total = others * (inputs + sums + weights * host.dtype.itemsize + gradients + dense)
    named = {"inputs": inputs, "allocation": dense, "gradients": gradients}
    most = ", ".join(f"{name} {others * amount / 1e9:.1f}" for name, amount in named.items() if amount)
    origin = f"{total / 1e9:.1f} GB come to each rank ({most}), at an assumed 10 Gbit/s"
    return Part("exchange", total / NETWORK, origin)


def _fed_bytes(
    trials: Sequence[Trial], sequences: int, needs: StatisticType, workload: Workload
) -> tuple[float, float]:
    """Return the bytes of all inputs that so many sequences feed to stages, and those of the sums."""
    inputs = sums = 0.0
    for trial in trials:
        kind = statistic_of(needs, trial)
        row = 4 / workload.length if kind is ColumnNorm else _fed_in(kind) * workload.dtype.itemsize
        for group, fed in zip(trial.groups, trial.fed, strict=True):
            inputs += sequences * workload.length * fed * group.inputs * row
            sums += 0 if kind is ColumnNorm else _handed_bytes(kind, group.inputs)
    return inputs, sums


def _allocation_bytes(blocks: Sequence[Trial], workload: Workload, recipe: Recipe) -> float:
    """Return the bytes of the pass of the dense model that shares out a sparsity, if there is one."""
    if not recipe.measures_costs:
        return 0.0
    handed = sum(_fed_bytes(blocks, min(MOST_SEQUENCES, workload.sequences), Gram, workload))
    if recipe.allocation == "fisher":  # squares of the gradient of each output, of one sequence after another
        outputs = sum(site.shape[0] for trial in blocks for group in trial.groups for site in group.sites)
        handed += 4 * outputs * min(MOST_FOLLOWED, workload.sequences)
    return handed


def _gradient_bytes(recipe: Recipe, workload: Workload, host: Outline) -> float:
    """Return the bytes of gradients of each weight: of every sequence, or of every batch in every epoch of tuning."""
    if recipe.needs is Gradient:
        return 4.0 * workload.sequences
    return host.dtype.itemsize * recipe.tune_epochs * workload.sequences / workload.batch


def _in_tiles(device: torch.device, workload: Workload) -> bool:
    """Say whether a Gram matrix is dealt out in tiles; else it is summed as a whole by one rank."""
    return len(Gram.tiles(torch.empty(1, 1 << 12, dtype=workload.dtype, device=device))) > 1


def _fed_in(needs: StatisticType) -> int:
    """Return how many inputs are handed round of each: with a dense target that of the dense model too."""
    return 2 if needs is CrossGram else 1


def _handed_bytes(needs: StatisticType, inputs: int) -> float:
    """Return what sums take that are handed round: half of a Gram matrix mirrors the other, all else is whole."""
    return needs.nbytes(inputs) - (Gram.nbytes(inputs) / 2 if issubclass(needs, Gram) else 0)


def _dealt_bytes(needs: StatisticType, inputs: int, device: torch.device, workload: Workload) -> float:
    """Return the bytes of a statistic's sums that one rank makes and hands round."""
    if needs is ColumnNorm:
        return 0.0
    return _handed_bytes(needs, inputs) / workload.ranks if _in_tiles(device, workload) else needs.nbytes(inputs)
