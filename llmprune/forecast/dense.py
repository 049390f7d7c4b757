"""What the passes of the dense model need: those that share out a sparsity, and those that bring gradients."""

from collections.abc import Sequence

from llmprune.budget.curves import SAMPLED_ROWS, cut_short
from llmprune.budget.dense import MOST_FOLLOWED, MOST_SEQUENCES, POINTS
from llmprune.forecast.parts import Part, Workload
from llmprune.forecast.yardstick import solving_time, statistic_time, statistic_work
from llmprune.model import Outline
from llmprune.model.groups import StatisticType
from llmprune.model.probe import Trial, without_dense
from llmprune.recipe import Recipe
from llmprune.statistics import ColumnNorm, CrossGram, Gradient, Gram

_BACKWARD = 3  # forwards that a block's second run and its backward take


def collected(recipe: Recipe) -> StatisticType | None:
    """Return the statistic that calibration collects, or one that takes as much where that is a gradient."""
    if recipe.dense_target:
        return CrossGram
    needs = recipe.needs or (Gram if recipe.calibrates else None)
    return ColumnNorm if needs is Gradient else needs


def seen(needs: StatisticType, trial: Trial) -> StatisticType:
    """Return the statistic of a stage: inputs of the dense model come where lanes are held side by side."""
    return needs if trial.side_by_side else without_dense(needs)


def dense_seconds(
    host: Outline, recipe: Recipe, workload: Workload, trials: Sequence[Trial], widest: int
) -> list[Part]:
    """Return the time of the passes that a recipe adds to a run."""
    share = min(1.0, MOST_SEQUENCES / workload.sequences)
    forward = sum(
        workload.sequences * trial.forward_flops(workload.length) * trial.seconds_per_flop for trial in trials
    )
    if recipe.needs is Gradient:
        return [Part("gradients", _BACKWARD * forward, "a forward timed here, and what a backward usually takes of it")]
    if recipe.allocation == "uniform" or recipe.allocation_file:
        return []
    each = statistic_time(Gram, widest, host.dtype, host.place)
    fed = [(group, tokens) for trial in trials for group, tokens in zip(trial.groups, trial.fed, strict=True)]
    work = sum(tokens * statistic_work(Gram, group.inputs) for group, tokens in fed)
    seconds = share * (2 * forward + workload.tokens * work * each)
    if recipe.allocation == "fisher":
        seconds += min(1.0, MOST_FOLLOWED / workload.sequences) * _BACKWARD * forward
    if recipe.allocation != "owl":
        times = solving_time(cut_short(recipe.solver()), recipe.target(), host.dtype, host.place)
        seconds += sum(
            times.seconds([(POINTS * min(SAMPLED_ROWS, site.shape[0]), site.shape[1]) for site in group.sites])
            for group, _ in fed
        )
    return [Part("allocation", seconds, f"at most {MOST_SEQUENCES} sequences, as what follows")]


def kept_memory(host: Outline, recipe: Recipe, workload: Workload) -> list[Part]:
    """Return what the hidden states before every block take, which gradients need; a run takes fewer if they do not fit."""
    if recipe.allocation != "fisher" and recipe.needs is not Gradient:
        return []
    sequences = workload.sequences if recipe.needs is Gradient else min(MOST_FOLLOWED, workload.sequences)
    hidden = getattr(host.config.get_text_config(), "hidden_size", 0)
    amount = len(host.blocks) * sequences * workload.length * hidden * host.dtype.itemsize
    return [Part("hidden states of all blocks", amount, f"for gradients, {sequences} sequences at most")]
