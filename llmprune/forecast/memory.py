"""How much memory a run needs: what it always holds, and what the most demanding step of the most demanding block adds."""

from collections.abc import Iterator, Mapping, Sequence

from llmprune.forecast.dense import backward_memory, collected, follows_gradients, kept_blocks, kept_memory
from llmprune.forecast.parts import Part, Workload
from llmprune.forecast.ranks import handed_memory, statistic_of
from llmprune.forecast.yardstick import copied_bytes, solving_bytes
from llmprune.model import Outline
from llmprune.model.memory import give_back_freed_memory, hidden_size
from llmprune.model.probe import Trial, block_kind, waiting_bytes
from llmprune.model.sites import Site, Stage
from llmprune.model.skeleton import merged_on_load
from llmprune.planning import Plan
from llmprune.progress import resident_bytes
from llmprune.recipe import Recipe
from llmprune.statistics import DenseTarget


def memory(
    host: Outline, plan: Plan, recipe: Recipe, workload: Workload | None, trials: Mapping[str, Trial]
) -> list[Part]:
    """Return the parts of a run's peak memory.

    Args:
        host: the model, without weights.
        plan: what is to be pruned.
        recipe: how.
        workload: of calibration; None for methods that need none.
        trials: of the stages, by their names, for methods that need calibration.
    """
    always = [base_memory(), outer_memory(host, _home(workload))]
    if workload:
        always.append(waiting_memory(workload, waiting_bytes(host, workload.batch, workload.length, workload.home)))
        always += kept_memory(host, recipe, workload) + kept_blocks(host, recipe)
    return always + max(_steps(host, plan, recipe, workload, trials), key=lambda parts: sum(p.amount for p in parts))


def _steps(
    host: Outline, plan: Plan, recipe: Recipe, workload: Workload | None, trials: Mapping[str, Trial]
) -> Iterator[list[Part]]:
    """Yield what each step of the run adds on the device: for one block of each kind load, collect and solve."""
    on = "device" if host.device.type == "cuda" else "host"
    merged = merged_on_load(host.model)
    if workload and follows_gradients(recipe):
        yield backward_memory(host, recipe, workload, on)
    for stage, sites in _different(host, plan):
        weights, trial = stage_memory(host, stage, on), trials.get(stage.name)
        yield [weights, loading_memory(stage, merged, on)]
        beside = list[Part]()
        if trial and workload and stage is not host.head:
            beside = beside_memory(host, sites, trial, workload, on)
        if sites:
            towards = recipe.dense_target if trial and trial.side_by_side else 0.0
            yield [weights, *beside, *_statistics(trial, on), solving_memory(host, sites, recipe, towards, on)]
        if sites and trial and workload:
            needs = collected(recipe)
            handed = handed_memory(trial, workload, needs, host, on) if workload.ranks > 1 and needs else []
            yield [
                weights,
                *beside,
                statistics_memory(trial, on),
                *collecting_memory(host, trial, workload, recipe, on),
                *handed,
            ]
        if sites and trial and workload and recipe.tune_epochs and stage is not host.head:
            yield [weights, *tuning_memory(host, sites, trial, workload, on)]


def _different(host: Outline, plan: Plan) -> list[tuple[Stage, list[Site]]]:
    """Return one stage of each kind that a run loads, and its sites."""
    ends = [stage for stage in (host.embedding, host.head) if stage.name in plan.sites]
    stages = [(stage, plan.sites.get(stage.name, [])) for stage in [*ends, *host.blocks]]
    return list({block_kind(stage, sites): (stage, sites) for stage, sites in stages}.values())


def _home(workload: Workload | None) -> str:
    """Return the side on which hidden states wait, and what lies between the blocks: `host` or `device`."""
    return "device" if workload and workload.home.type == "cuda" else "host"


def _statistics(trial: Trial | None, on: str) -> list[Part]:
    return [statistics_memory(trial, on)] if trial else []


def base_memory() -> Part:
    """Return what this process occupies with its libraries, and the model without weights."""
    give_back_freed_memory()
    return Part("this process", resident_bytes(), "measured now, with the libraries loaded")


def outer_memory(host: Outline, on: str = "host") -> Part:
    """Return what stays loaded for the whole run: embedding, final norm, and a head that is one with the embedding.

    The embedding counts as a whole: it lies in its mapped file, but the system maps far more around each row that is
    looked up, all of it after a few hundred rows.
    """
    return Part("outside the blocks", host.outer_bytes(), "parameters that belong to no block", on)


def waiting_memory(workload: Workload, per_batch: int) -> Part:
    """Return what the calibration sequences take while they wait between blocks."""
    origin = f"measured with one batch of {workload.batch} x {workload.length} tokens, {workload.lanes} batches"
    dense = ", half of them of the dense model" if workload.dense_stream else ""
    return Part("hidden states", per_batch * workload.lanes, origin + dense, _home(workload))


def stage_memory(host: Outline, stage: Stage, on: str) -> Part:
    """Return what a loaded block takes."""
    return Part("one block", host.bytes_of(stage), f"parameters of {stage.name}", on)


def loading_memory(stage: Stage, merged: Sequence[str], on: str) -> Part:
    """Return what loading or writing a block takes beside it: the pieces from which some parameters are put together."""
    pieces = sum(p.nbytes for name, p in stage.module.named_parameters(stage.name) if name in merged)
    return Part("pieces of experts", pieces, "parameters that the checkpoint holds in pieces", on)


def statistics_memory(trial: Trial, on: str) -> Part:
    """Return what the statistics of a block take."""
    origin = "one per group, all at once"
    if trial.runs > 1:
        origin = f"one per group, summed in {trial.runs} runs"
    elif trial.side_by_side:
        origin = "one group at a time"
    return Part("statistics", trial.statistics_bytes, origin, on)


def beside_memory(host: Outline, sites: Sequence[Site], trial: Trial, workload: Workload, on: str) -> list[Part]:
    """Return what a block takes all along while it is pruned, for lanes held side by side and for the dense model."""
    if not trial.side_by_side:
        return [outputs_memory(host, workload, on)] if workload.dense_stream else []
    held = workload.lanes * workload.tokens_at_once * trial.held_bytes
    parts = [Part("all batches within a block", held, f"measured on a few tokens, {workload.lanes} batches", on)]
    if workload.dense_stream:
        dense = host.dtype.itemsize * sum(site.numel for site in sites)
        parts.append(Part("dense weights", dense, "copies of what is pruned in a block", on))
    return parts


def outputs_memory(host: Outline, workload: Workload, on: str, streams: int = 1) -> Part:
    """Return what the outputs of a block take, of the dense model alone or (two streams) of the pruned one too."""
    hidden_bytes = hidden_size(host.config) * host.dtype.itemsize
    amount = streams * workload.batches * workload.tokens_at_once * hidden_bytes
    return Part("outputs of a block", amount, f"{streams * workload.batches} batches", on)


def collecting_memory(host: Outline, trial: Trial, workload: Workload, recipe: Recipe, on: str) -> list[Part]:
    """Return what collecting the statistics of a block takes beside them."""
    scaled = "measured on a few tokens of one block, scaled by tokens"
    widest = max(group.inputs for group in trial.groups)
    needs = collected(recipe)
    copies = (
        copied_bytes(statistic_of(needs, trial), widest, workload.length, workload.dtype, host.device) if needs else 0
    )
    if workload.dtype != host.dtype:
        copies += workload.tokens_at_once * widest * workload.dtype.itemsize
    inputs = 0 if trial.side_by_side else trial.input_bytes  # those are among what is held
    return [
        Part("inputs of one batch", workload.tokens_at_once * inputs, scaled, on),
        Part("one forward", trial.forward_memory(workload.tokens_at_once), scaled, on),
        Part("copies for statistics", copies, "measured on samples, scaled by tokens and size", on),
    ]


def solving_memory(host: Outline, sites: Sequence[Site], recipe: Recipe, towards: DenseTarget, on: str) -> Part:
    """Return what solving the most demanding of the sites, with that dense target, takes beside it and its statistic."""
    method, pattern = recipe.solver(), recipe.target()
    shapes = {site.shape for site in sites}
    weighed = recipe.weighs_rows
    needed = {
        shape: solving_bytes(method, pattern, shape, host.dtype, host.device, towards, weighed) for shape in shapes
    }
    shape = max(shapes, key=lambda shape: (needed[shape], shape))
    return Part("solving", needed[shape], f"measured on a sample of a matrix {list(shape)}, scaled by weights", on)


def tuning_memory(host: Outline, sites: Sequence[Site], trial: Trial, workload: Workload, on: str) -> list[Part]:
    """Return what tuning a block takes beside it: four copies in fp32, three in its own dtype, and batches' gradients."""
    gradients = workload.step[1] if workload.ranks > 1 else 1
    each = 4 * 4 + (3 + gradients) * host.dtype.itemsize
    state = each * sum(site.numel for site in sites)
    forward = trial.forward_memory(workload.tokens_at_once)
    return [
        outputs_memory(host, workload, on, streams=2 if trial.side_by_side else 1),
        Part("weights while tuned", state, "in fp32 with gradients and Adam's means, and the best ones seen", on),
        Part("one forward", forward, "measured on a few tokens of one block without gradients, which hold more", on),
    ]


def peak(parts: Sequence[Part]) -> dict[str, int]:
    """Return the sums of memory parts, on the host and on the GPU."""
    return {on: sum(int(part.amount) for part in parts if part.on == on) for on in ("host", "device")}
