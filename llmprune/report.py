"""What a run leaves behind: which weights were pruned, at what cost, from what, in what time and memory."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.calibration import Tokens
from llmprune.environment import hardware, peak_memory, versions
from llmprune.errors import RecipeError
from llmprune.model.sites import Site
from llmprune.patterns import Pattern
from llmprune.planning import Host, Plan
from llmprune.progress import resident_bytes
from llmprune.solving import Outcome
from llmprune.statistics import Gradient, Gram, Statistic
from llmprune.structure import fields_of
from llmprune.tuning import BlockTuning

if TYPE_CHECKING:
    from llmprune.uploading import Published

_SHOWN_NOTES = 8  # a mixture may have one for each of a thousand experts


@dataclass(frozen=True)
class SiteReport:
    """One pruned matrix.

    Attributes:
        error: squared change of the outputs relative to the squared outputs, summed over the calibration tokens; with a
            dense target, both are of the weights that meet it best without a pattern.
        error_norm: what `error` was measured with: `gram` (the true outputs), `column_norm` (inputs taken as
            uncorrelated), `gradient` (Σ (Δw · dL/dw)², no output) or `weights` (all inputs taken as equal).
        magnitude_error: `error`, had magnitude chosen as many weights; None where it was not measured.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    sparsity: float
    error: float
    error_norm: str
    tokens: int
    notes: tuple[str, ...] = ()
    magnitude_error: float | None = None

    @classmethod
    def of(
        cls,
        site: Site,
        outcome: Outcome,
        pattern: Pattern,
        statistic: Statistic | None,
        notes: tuple[str, ...] = (),
    ) -> "SiteReport":
        """Return the report on a solved site."""
        norm = "gram" if isinstance(statistic, Gram) else "gradient" if isinstance(statistic, Gradient) else None
        return cls(
            name=site.name,
            shape=site.shape,
            pattern=str(pattern),
            zeros=outcome.zeros,
            sparsity=outcome.zeros / site.numel,
            error=outcome.error,
            error_norm=norm or ("column_norm" if statistic else "weights"),
            tokens=statistic.tokens if statistic else 0,
            notes=notes + outcome.notes,
            magnitude_error=outcome.magnitude_error,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SiteReport":
        """Return the report that `asdict` and JSON have made plain."""
        plain = fields_of(cls, values)
        return cls(**plain | {"shape": tuple(values["shape"]), "notes": tuple(values["notes"])})


@dataclass
class Clock:
    """Seconds spent in each phase; what lies within another phase counts for itself alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _within: float = field(default=0.0, init=False)  # seconds that phases within the present one have taken

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside the block, and until a GPU has done what it was given, to the phase called `name`."""
        started, before, self._within = time.perf_counter(), self._within, 0.0
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        finally:
            took = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._within
            self._within = before + took


@dataclass
class Report:
    """The whole run; `to_json` is what `llmprune.json` holds.

    Attributes:
        model: as the user named it.
        recipe: all options, as plain values.
        blocks: how many decoder blocks the model has.
        parameters: of the whole model.
        coverage: share of the parameters beside embeddings and head that are in matrices to prune, 0 to 1.
        calibration: `data`, `fingerprint`, `sequences`, `tokens` and a `note`; None where none was needed.
        sites: a `SiteReport` for each pruned matrix, in the order of the model.
        left_dense: why each other tensor of two dimensions or more was not pruned, by its name.
        notes: what a user should know of the run.
        allocation: how a sparsity was shared out over the matrices, see `budget.Choice`; None where it was not.
        retries: what was given up where memory ran out.
        clock: seconds in each phase, with several ranks the first one's. In one pass for several results, solving is
            summed over all ranks; what results share that come one after another counts for the first that needs it.
        peak: the most bytes in use, on the `host` and on the `device` (a GPU).
        memory: the same while each stage was pruned, by its name.
        one_pass: the patterns of the results that share a calibration pass with this one.
        most_runs: how often a block was run to collect its statistics, at most.
        out: the output folder; None for a model that was pruned in place.
        tuning: what tuning each block came to, where that was asked for.
    """

    model: str
    recipe: dict[str, Any]
    blocks: int
    parameters: int
    coverage: float = 1.0
    calibration: dict[str, Any] | None = None
    sites: list[SiteReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    allocation: dict[str, Any] | None = None
    retries: list[str] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    peak: dict[str, int] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    one_pass: list[str] | None = None
    most_runs: int = 0
    out: Path | None = None
    tuning: list[BlockTuning] = field(default_factory=list)

    @classmethod
    def begin(cls, model: str, recipe: dict[str, Any], host: Host, plan: Plan, tokens: Tokens | None) -> "Report":
        """Return the report of a run that is about to start."""
        report = cls(model, recipe, len(host.blocks), plan.parameters, plan.coverage, left_dense=dict(plan.left_dense))
        if tokens is not None:
            report.calibration = {
                "data": tokens.name,
                "fingerprint": tokens.fingerprint,
                "sequences": len(tokens.rows),
                "tokens": sum(len(row) for row in tokens.rows),
                "note": tokens.note,
            }
        return report

    @classmethod
    def from_json(cls, values: dict[str, Any], out: Path) -> "Report":
        """Return the report that an output folder's `llmprune.json` holds."""
        return cls(
            values["model"],
            values["recipe"],
            blocks=values["parameters"]["blocks"],
            parameters=values["parameters"]["all"],
            coverage=values["coverage"]["inner_parameters"],
            calibration=values["calibration"],
            sites=[SiteReport.from_json(site) for site in values["sites"]],
            left_dense=values["left_dense"],
            notes=values["notes"],
            clock=Clock(values["timings"]),
            peak=values["peak_memory_bytes"],
            memory=values["memory_bytes"],
            one_pass=values["one_pass"],
            out=out,
            tuning=[BlockTuning.from_json(block) for block in values["tuning"]],
        )

    def note_memory(self, stage: str) -> None:
        """Note the memory that is in use while a stage is pruned, if it is more than before."""
        device = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        before = self.memory.get(stage, {"host": 0, "device": 0})
        self.memory[stage] = {"host": max(before["host"], resident_bytes()), "device": max(before["device"], device)}

    def close(self, plan: Plan) -> None:
        """Note the memory that was needed, and which sites no calibration input ever reached."""
        self.peak = peak_memory()
        # Linux counts pages by processor and sums them up late: the highest mark may lie below what was seen.
        self.peak["host"] = max([self.peak["host"], *(used["host"] for used in self.memory.values())])
        order = {site.name: place for place, site in enumerate(plan.all_sites())}
        self.sites.sort(key=lambda site: order[site.name])
        if self.most_runs > 1 and not self.recipe["true_sequential"]:
            runs = f"up to {self.most_runs} runs"
            self.notes.append(f"statistics of a block were collected in {runs}, to bound their memory")
        pruned = {site.name for site in self.sites}
        self.left_dense |= {s.name: "never given an input" for s in plan.all_sites() if s.name not in pruned}

    @property
    def site_parameters(self) -> int:
        """Weights in all pruned matrices."""
        return sum(site.shape[0] * site.shape[1] for site in self.sites)

    @property
    def zeros(self) -> int:
        """Zeros in all pruned matrices."""
        return sum(site.zeros for site in self.sites)

    def tuned_vectors(self, block: str) -> list[str]:
        """Return the gains and biases that tuning has changed in a block."""
        return [name for tuning in self.tuning if tuning.block == block for name in tuning.vectors]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "seed": self.recipe["seed"],
            "calibration": self.calibration,
            "sparsity": {
                "sites": self.zeros / max(self.site_parameters, 1),
                "all_parameters": self.zeros / self.parameters,
            },
            "parameters": {"sites": self.site_parameters, "all": self.parameters, "blocks": self.blocks},
            "coverage": {"all_parameters": self.site_parameters / self.parameters, "inner_parameters": self.coverage},
            "sites": [asdict(site) for site in self.sites],
            "allocation": self.allocation,
            "tuning": [tuning.to_json() for tuning in self.tuning],
            "left_dense": self.left_dense,
            "notes": self.notes + self.retries,
            "timings": {name: round(seconds, 4) for name, seconds in self.clock.seconds.items()},
            "peak_memory_bytes": self.peak,
            "memory_bytes": self.memory,
            "one_pass": self.one_pass,
            "versions": versions(),
            "hardware": hardware(),
        }

    def push(self, repo: str, **options: Any) -> "Published":
        """Publish the output folder on the Hub; `options` are those of `llmprune.push`.

        Raises:
            RecipeError: the model was pruned in place, so that there is no output folder.
            LlmpruneError: as `llmprune.push`.
        """
        from llmprune.publishing import push

        if self.out is None:
            raise RecipeError("a model pruned in place has no output folder: prune its folder or Hub id to publish it")
        return push(self.out, repo, **options)

    def __str__(self) -> str:
        sites, seconds = len(self.sites), self.clock.seconds
        lines = [
            f"{self.model}: {self.recipe['method']} {self.recipe['pattern']}, {sites} matrices in {self.blocks} blocks",
            f"  zeros         {self.zeros / max(self.site_parameters, 1):.4%} of the pruned matrices, "
            f"{self.zeros / self.parameters:.4%} of all parameters",
            f"  output error  {self._errors()}",
            *self._tuning(),
            f"  pruned        {self.coverage:.1%} of the parameters beside embeddings are in these matrices",
            f"  left dense    {left_dense_text(self.left_dense)}",
            "  time          " + ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items()),
            f"  peak memory   {self.peak['host'] / 2**30:.2f} GiB",
        ]
        notes = self.all_notes()
        lines += [f"  note          {note}" for note in notes[:_SHOWN_NOTES]]
        if len(notes) > _SHOWN_NOTES:
            lines.append(f"  note          and {len(notes) - _SHOWN_NOTES} more in llmprune.json")
        return "\n".join(lines)

    def _errors(self) -> str:
        if not self.sites:
            return "none, as no matrix was pruned"
        mean = sum(site.error for site in self.sites) / len(self.sites)
        worst = max(self.sites, key=lambda site: site.error)
        return f"mean {mean:.4g}, largest {worst.error:.4g} ({worst.name}), by {worst.error_norm}"

    def _tuning(self) -> list[str]:
        if not self.tuning:
            return []
        kept = sum(tuning.kept for tuning in self.tuning)
        before, after = (sum(getattr(tuning, name) for tuning in self.tuning) for name in ("before", "after"))
        mean = f"mean {before / len(self.tuning):.4g} before, {after / len(self.tuning):.4g} after"
        return [f"  tuned         {kept} of {len(self.tuning)} blocks, their error on sequences held out {mean}"]

    def all_notes(self) -> list[str]:
        """Return the run's notes, then the sites'."""
        return self.notes + self.retries + [f"{site.name}: {note}" for site in self.sites for note in site.notes]


def left_dense_text(reasons: Mapping[str, str]) -> str:
    """Return how many tensors stay dense, and for which reasons, in words; `reasons` are by the tensors' names."""
    listed = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons.values()).most_common())
    return f"{len(reasons)} tensors beside norms and biases" + (f": {listed}" if listed else "")
