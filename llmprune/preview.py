"""`llmprune.plan`: what a run would do and need, without loading a weight."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmprune import forecast
from llmprune.checkpoint import Source
from llmprune.checkpoint.source import CONFIG, has_weights, read_fields
from llmprune.environment import hardware, versions
from llmprune.errors import RecipeError
from llmprune.forecast import Part, Workload
from llmprune.locate import locate
from llmprune.model import Outline
from llmprune.model.memory import statistics_budget
from llmprune.model.probe import Trial, try_blocks, try_head
from llmprune.model.streamed import stored_dtype
from llmprune.options import require_whole
from llmprune.planning import Plan, make_plan, multiplied_in
from llmprune.progress import size_text
from llmprune.recipe import Recipe
from llmprune.report import left_dense_text


@dataclass(frozen=True)
class Preview:
    """What a run would do and need. `to_json` has the keys, of which later versions keep every one:

    model, recipe: as in the report of a run.
    blocks, groups: how many; a group is the sites that share an input, null for methods that look at weights only.
    sites: how many matrices are to be pruned, by kind: `Linear`, `Conv1D`, `expert`, `Embedding`.
    parameters, coverage, left_dense: as in the report of a run.
    left_dense_counts: how many tensors stay dense for each reason.
    memory: `peak_bytes` on the `host` and on the `device` (a GPU), and the `parts` of which it is the sum.
    disk: `bytes` that the output takes, and their `origin`.
    time: `seconds`, and the `parts` of which they are the sum; reading and writing files is not among them.
    notes: what a user should know.
    versions, hardware: on what this was measured.

    Each part has a `name`, its `bytes` or `seconds`, and its `origin`: where the number comes from.
    """

    model: str
    recipe: dict[str, Any]
    blocks: int
    groups: int | None
    sites: dict[str, int]
    parameters: dict[str, int]
    coverage: dict[str, float]
    left_dense: dict[str, str]
    memory: list[Part]
    disk: Part
    time: list[Part]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the preview as plain values."""
        memory = [{"name": p.name, "bytes": int(p.amount), "origin": p.origin, "on": p.on} for p in self.memory]
        time = [{"name": p.name, "seconds": round(p.amount, 3), "origin": p.origin} for p in self.time]
        return asdict(self) | {
            "left_dense_counts": dict(Counter(self.left_dense.values()).most_common()),
            "memory": {"peak_bytes": forecast.peak(self.memory), "parts": memory},
            "disk": {"bytes": int(self.disk.amount), "origin": self.disk.origin},
            "time": {"seconds": round(self.seconds, 3), "parts": time},
            "versions": versions(),
            "hardware": hardware(),
        }

    @property
    def seconds(self) -> float:
        """The time that the run takes, without reading and writing files."""
        return sum(part.amount for part in self.time)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.sites.items())
        groups = "" if self.groups is None else f" in {self.groups} groups that share an input"
        lines = [
            f"{self.model}: {self.recipe['method']} {self.recipe['pattern']}, nothing loaded, nothing written",
            f"  blocks        {self.blocks}",
            f"  matrices      {kinds}{groups}",
            f"  pruned        {self.coverage['inner_parameters']:.1%} of the parameters beside embeddings, "
            f"{self.coverage['all_parameters']:.1%} of all {self.parameters['all']:,}",
            f"  left dense    {left_dense_text(self.left_dense)}",
        ]
        for on, total in forecast.peak(self.memory).items():
            parts = [part for part in self.memory if part.on == on and part.amount]
            if parts:
                lines.append(f"  memory        {size_text(total)} on the {on}")
                lines += [f"    {size_text(p.amount):>12}  {p.name} ({p.origin})" for p in parts]
        lines.append(f"  disk          {size_text(self.disk.amount)} ({self.disk.origin})")
        lines.append(f"  time          {_duration(self.seconds)}, without reading and writing files")
        lines += [f"    {p.amount:10.1f} s  {p.name} ({p.origin})" for p in self.time]
        return "\n".join(lines + [f"  note          {note}" for note in self.notes])


def plan(model: str | Path, *, ranks: int = 1, **options: Any) -> Preview:
    """Return what `prune` would do with a model, and what that would need, without loading its weights.

    A config.json alone is enough, and all that is fetched of a model on the Hub. Calibration data is not read.

    Args:
        model: a folder, a Hub id or `demo`.
        ranks: how many processes are to share the work; memory and time are then those of the one that needs the most,
            taking each to be on a machine, or a GPU, like this one.
        options: the fields of `llmprune.Recipe`.

    Raises:
        LlmpruneError: what `prune` raises before it reads weights or calibration data.
    """
    require_whole("ranks", ranks, 1)
    recipe = Recipe.of(options)
    if not isinstance(model, str | Path):
        raise RecipeError("a plan is made for a folder, a Hub id or 'demo', not for a loaded model")
    code = ("*.py",) if recipe.trust_remote_code else ()
    folder = locate(model, recipe.revision, (CONFIG, *code))
    source = Source.open(folder) if has_weights(folder) else None
    recipe = recipe.for_model(model)
    fields = source.config if source else read_fields(folder)
    dtype = recipe.compute_dtype() or (stored_dtype(source) if source else None)
    host = Outline(folder, fields, recipe.place(), dtype, recipe.trust_remote_code)
    return _preview(str(model), host, source, make_plan(host, recipe), recipe, ranks)


def _preview(model: str, host: Outline, source: Source | None, plan: Plan, recipe: Recipe, ranks: int) -> Preview:
    workload = Workload.of(recipe, host, ranks) if forecast.collected(recipe) else None
    trials = _trials(host, plan, recipe, workload) if workload else {}
    pruned = sum(site.numel for site in plan.all_sites())
    return Preview(
        model=model,
        recipe=recipe.to_json(),
        blocks=len(host.blocks),
        groups=sum(len(trial.groups) for trial in trials.values()) if workload else None,
        sites=dict(Counter(site.kind for site in plan.all_sites())),
        parameters={"sites": pruned, "all": plan.parameters},
        coverage={"all_parameters": pruned / plan.parameters, "inner_parameters": plan.coverage},
        left_dense=plan.left_dense,
        memory=forecast.memory(host, plan, recipe, workload, trials),
        disk=forecast.disk(host, source),
        time=forecast.duration(host, plan, recipe, workload, trials, ranks),
        notes=_notes(source, workload, ranks) + _too_many(host, recipe, workload),
    )


def _trials(host: Outline, plan: Plan, recipe: Recipe, workload: Workload) -> dict[str, Trial]:
    """Try out the stages that calibration visits."""
    needs = forecast.collected(recipe)
    assert needs is not None
    host.open(workload.home)
    budget = statistics_budget(max(host.bytes_of(block) for block in host.blocks), host.device)
    trials = try_blocks(
        host,
        plan.sites,
        needs,
        budget,
        true_sequential=recipe.true_sequential,
        home=workload.home,
        longest=workload.length,
        side_by_side=workload.side_by_side,
        autocast=multiplied_in(host, recipe),
        at_once=workload.tokens_at_once,
    )
    if head := plan.sites.get(host.head.name):
        trials[host.head.name] = try_head(host, head, needs, trials[host.blocks[-1].name])
    return trials


def _notes(source: Source | None, workload: Workload | None, ranks: int) -> list[str]:
    notes = [] if source else ["no weights were looked at: dtype and sizes are those that config.json tells"]
    if workload:
        notes.append(f"calibration is taken to be {workload.sequences} sequences of {workload.length} tokens, unread")
    if ranks > 1:
        notes.append(f"memory and time are of each of {ranks} ranks, each with hardware like this")
    return notes


def _too_many(host: Outline, recipe: Recipe, workload: Workload | None) -> list[str]:
    if workload is None or not recipe.dense_target or workload.fits_side_by_side(host):
        return []
    tokens = workload.lanes * workload.tokens_at_once
    return [f"a dense target holds the activations of {tokens} tokens, too many here: a run needs fewer samples"]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
