"""What the user asked for, checked as far as that is possible without a model."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmprune import methods, overrides, patterns
from llmprune.errors import RecipeError, did_you_mean
from llmprune.locate import DEMO
from llmprune.methods import Method
from llmprune.options import DTYPES, as_globs, is_number, require_dtype, require_whole, resolve_device
from llmprune.patterns import COMPARISON_GROUPS, NM, ComparisonGroup, Unstructured
from llmprune.presets import expanded
from llmprune.statistics import ColumnMoments, ColumnNorm, DenseTarget, Gradient, Gram

ALLOCATIONS = ("uniform", "owl", "error", "fisher")


@dataclass(frozen=True)
class Recipe:
    """All options of a run; the names are those of the command line and of recipe files.

    Attributes:
        method: name of a file in `llmprune/methods/`, or a method object.
        pattern: `50%` or `0.5` (unstructured), or `N:M`: N kept of every M.
        comparison_group: `row`, `layer`, `block` or `model`; None is the method's own. N:M takes none.
        method_options: hyper-parameters of the method, by name.
        calibration: what `llmprune.data.read` reads; None is `c4`, or the shipped excerpt for `demo`.
        samples: calibration sequences; None is 128, or all rows of an `input_ids` column.
        length: tokens a sequence; None is 2048, or the model's context where that is shorter.
        seed: of sampling and of the random method.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto` (as the checkpoint is stored), `float32`, `float16` or `bfloat16`.
        batch_size: sequences a forward; None sizes it to the memory. Gradients are taken of one at a time.
        true_sequential: solve the matrices of a block in the order in which they are reached, each from inputs that have
            passed through the earlier ones pruned; otherwise all of them from inputs of the block as it was.
        dense_target: share of the dense model's outputs, 0 to 1, in what pruned matrices are fitted to; the rest is the
            outputs that the dense matrix has on the pruned model's inputs. `auto` is up to 0.7, less where there are few
            tokens for each input (`CrossGram.share`). Needs `true_sequential`.
        allocation: how a sparsity is shared out over the sites: `uniform`; by cost, `error` (of a site's outputs) or
            `fisher` (of the loss, by one backward pass, which also weighs the rows of matrices whose weights compete as a
            whole); `owl` by the outliers of blocks; or the path of a `sensitivity.json`, by the curves that `llmprune
            sensitivity` measured. In all the sites it is exact.
        allocation_range: how far a site's sparsity may then be from the pattern's, a share between 0 and 1.
        sparsities: sparsities of sites by glob, as `pattern` has them. The first glob that matches counts; all other
            sites have the pattern's own sparsity, in their sum if that is shared out.
        overrides: by glob, another `method`, `pattern`, `method_options` or `comparison_group`; the first glob that
            matches counts. A pattern stated here is kept exactly, as a sparsity stated in `sparsities` is.
        tune_epochs: how often the calibration sequences pass through each pruned block to tune what survives in it
            towards the dense block's output; 0 tunes nothing.
        tune_rate: first step size of that, relative to the weights; see `llmprune.tuning`.
        autocast: in a float32 model, multiply in bfloat16 during calibration, with sums in float32, where the hardware
            is faster at that; weights and solving stay float32, as does the way of gradients back through the blocks.
        include, exclude: globs on tensor names, added to and taken from what is pruned by default.
        deterministic: use only operations that repeat themselves to the bit; where a GPU has none, refuse.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: run code that comes with the model.
    """

    method: str | Method = "sparsegpt"
    pattern: str | float = "50%"
    comparison_group: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Any = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    true_sequential: bool = False
    dense_target: DenseTarget = 0.0
    allocation: str = "uniform"
    allocation_range: float = 0.15
    sparsities: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tune_epochs: int = 0
    tune_rate: float = 0.2
    autocast: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    deterministic: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with these options set, on top of the preset called `preset` if that is among them.

        Raises:
            RecipeError: an option is unknown or out of range, or two contradict each other.
            PatternError: the pattern cannot be read.
        """
        require_known(options)
        values = expanded(options)
        for name in ("include", "exclude"):
            if name in values:
                values[name] = as_globs(name, values[name])
        recipe = cls(**values)
        recipe.require_valid()
        return recipe

    def require_valid(self) -> None:
        """Raise RecipeError or PatternError for what is wrong whatever the model is."""
        for name, least in (("samples", 1), ("length", 2), ("batch_size", 1), ("seed", 0), ("tune_epochs", 0)):
            require_whole(name, getattr(self, name), least)
        for name in ("true_sequential", "autocast", "deterministic", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} must be true or false, not {getattr(self, name)!r}")
        require_dtype(self.dtype)
        self.solver()
        self.target()
        self.place()
        self._require_dense_target()
        overrides.require_valid(self, self.overrides, self.sparsities)
        self._require_allocation()
        self._require_one_statistic()
        self._require_something_to_share()
        self._require_tuning()

    @property
    def dense_stream(self) -> bool:
        """Whether the dense model is to run beside the pruned one."""
        return bool(self.dense_target or self.tune_epochs)

    def _require_tuning(self) -> None:
        if not is_number(self.tune_rate) or not 0 < self.tune_rate < math.inf:
            raise RecipeError(f"tune_rate must be a number above 0, not {self.tune_rate!r}")
        if self.tune_epochs and self.solver().needs is None:
            raise RecipeError(f"{methods.name_of(self.solver())} needs no calibration: leave out tune_epochs")
        if self.tune_epochs and self.samples == 1:
            raise RecipeError("tune_epochs holds out a tenth of the samples: ask for more of them, or tune_epochs 0")

    def _require_dense_target(self) -> None:
        if self.dense_target != "auto" and not (is_number(self.dense_target) and 0 <= self.dense_target <= 1):
            raise RecipeError(f"dense_target must be a number from 0 to 1, or 'auto', not {self.dense_target!r}")
        if self.dense_target and self.solver().needs is not Gram:
            raise RecipeError(f"{methods.name_of(self.solver())} fits no outputs: leave out dense_target")
        if self.dense_target and not self.true_sequential:
            raise RecipeError("dense_target needs true_sequential, so that a block is solved as its inputs change")

    def _require_allocation(self) -> None:
        if self.allocation not in ALLOCATIONS and not self.allocation_file:
            hint = did_you_mean(str(self.allocation), ALLOCATIONS)
            raise RecipeError(f"unknown allocation '{self.allocation}': {hint}")
        if not is_number(self.allocation_range) or not 0 < self.allocation_range < 1:
            raise RecipeError(f"allocation_range must be a number between 0 and 1, not {self.allocation_range!r}")

    def _require_one_statistic(self) -> None:
        """One kind of statistic is collected in a run, which all methods and the allocation share."""
        if self.needs is Gradient:
            self._require_gradients()
        elif self.needs is Gram and ColumnMoments in self._needed:
            raise RecipeError(
                "overrides mix dsnot, which needs means of inputs, with a method that needs a Gram matrix"
            )
        if ColumnMoments in self._needed and self.allocation in ("error", "fisher"):
            raise RecipeError(f"allocation '{self.allocation}' solves from Gram matrices, dsnot from means: use owl")

    def _require_something_to_share(self) -> None:
        """What sites differ in must be theirs to have: N:M is the same everywhere, and a model's budget is one."""
        pattern = self.target()
        stated = [name for name in ("sparsities", "overrides") if getattr(self, name)]
        stated += [f"allocation '{self.allocation}'"] if self.allocation != "uniform" else []
        for name in stated:
            if isinstance(pattern, Unstructured) and pattern.group == "model":
                raise RecipeError(f"comparison_group 'model' already shares out the sparsity: leave out {name}")
            if isinstance(pattern, NM) and name != "overrides":
                raise RecipeError(
                    f"{name} shares out a sparsity, {pattern} is the same everywhere: use 50% or the like"
                )

    def _require_gradients(self) -> None:
        """Gradients are those of the dense model, and come in the reverse order of blocks."""
        name = next(methods.name_of(solver) for solver in self._solvers if solver.needs is Gradient)
        for option in ("true_sequential", "tune_epochs"):
            if getattr(self, option):
                raise RecipeError(f"{name} takes the dense model's gradients: leave out {option}")
        if self._needed - {Gradient, None}:
            raise RecipeError(
                f"{name} prunes from the last block to the first: no overrides with methods that see inputs"
            )
        if self.allocation in ("error", "fisher"):
            raise RecipeError(f"allocation '{self.allocation}' solves from inputs, {name} from gradients: use owl")

    def at(self, name: str) -> "Recipe":
        """Return the recipe of one site, by its tensor's name: the same for all, where nothing is stated for it."""
        changes = overrides.changes_for(name, self.overrides, self.sparsities)
        return overrides.changed(self, changes) if changes else self

    def states_pattern(self, name: str) -> bool:
        """Say whether a site's pattern is stated for it, by its tensor's name."""
        return "pattern" in overrides.changes_for(name, self.overrides, self.sparsities)

    @property
    def needs(self) -> type[Any] | None:
        """The statistic that serves all methods of the recipe: a Gram matrix where one needs it."""
        return next((kind for kind in (Gradient, Gram, ColumnMoments, ColumnNorm) if kind in self._needed), None)

    @property
    def _needed(self) -> set[Any]:
        return {solver.needs for solver in self._solvers}

    @property
    def _solvers(self) -> list[Method]:
        """The methods of all sites."""
        parts = [self, *(overrides.changed(self, changes) for changes in self.overrides.values())]
        return [part.solver() for part in parts]

    @property
    def calibrates(self) -> bool:
        """Whether calibration data is needed."""
        return self.needs is not None or self.measures_costs

    @property
    def measures_costs(self) -> bool:
        """Whether a pass through the dense model measures how to share out the sparsity."""
        return self.allocation != "uniform" and not self.allocation_file

    @property
    def allocation_file(self) -> str | None:
        """The file whose curves share out the sparsity, where `allocation` names one."""
        return str(self.allocation) if str(self.allocation).endswith(".json") else None

    @property
    def weighs_rows(self) -> bool:
        """Whether the rows of a matrix compete, each by what its errors cost."""
        return self.allocation == "fisher" and self.comparison_group != "row"

    def solver(self) -> Method:
        """Return the method with its hyper-parameters set."""
        if not isinstance(self.method_options, Mapping):
            raise RecipeError(f"method_options must map names to values, not {self.method_options!r}")
        if not isinstance(self.method, str):
            return _method_object(self.method, self.method_options)
        return methods.get(self.method, dict(self.method_options))

    def target(self) -> Unstructured | NM:
        """Return the pattern, with its comparison group."""
        solver, pattern = self.solver(), patterns.parse(self.pattern)
        if self.comparison_group is None:
            return patterns.in_group(pattern, solver.comparison_group)
        group = self.group(solver)
        if isinstance(pattern, NM):
            raise RecipeError(f"comparison_group '{group}' has no meaning for {pattern}: N:M compares M neighbours")
        return patterns.in_group(pattern, group)

    def group(self, solver: Method) -> ComparisonGroup:
        """Return the comparison group that was asked for, if the method can follow it."""
        for group in solver.comparison_groups:
            if group == self.comparison_group:
                return group
        if self.comparison_group not in COMPARISON_GROUPS:
            hint = did_you_mean(str(self.comparison_group), COMPARISON_GROUPS)
            raise RecipeError(f"unknown comparison_group '{self.comparison_group}': {hint}")
        allowed = ", ".join(solver.comparison_groups)
        raise RecipeError(f"{methods.name_of(solver)} cannot compare per {self.comparison_group}: it takes {allowed}")

    def for_model(self, model: str | Path) -> "Recipe":
        """Return the recipe with the defaults that depend on the model: `demo` calibrates on its own excerpt."""
        return dataclasses.replace(self, calibration=DEMO) if model == DEMO and self.calibration is None else self

    def require_in_place(self) -> None:
        """Raise RecipeError for options that mean nothing for a model that is already loaded."""
        for name, default in (("device", "auto"), ("dtype", "auto"), ("revision", None), ("trust_remote_code", False)):
            if getattr(self, name) != default:
                raise RecipeError(f"{name} means nothing for a loaded model: it is pruned where it is, as it is")

    def place(self) -> torch.device:
        """Return the device to run on."""
        return resolve_device(self.device)

    def compute_dtype(self) -> torch.dtype | None:
        """Return the dtype to compute in, None for that of the checkpoint."""
        return DTYPES.get(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain values, the method spelled out with all its hyper-parameters."""
        solver = self.solver()
        fields: dict[str, Any] = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        fields["method"] = methods.name_of(solver)
        fields["method_options"] = {item.name: getattr(solver, item.name) for item in dataclasses.fields(solver)}  # type: ignore[arg-type]
        fields["sparsities"] = {glob: str(value) for glob, value in self.sparsities.items()}
        parts = {glob: overrides.changed(self, changes).to_json() for glob, changes in self.overrides.items()}
        told = {"method": ("method", "method_options")}  # a method is told with all its options
        fields["overrides"] = {
            glob: {name: parts[glob][name] for option in changes for name in told.get(option, (option,))}
            for glob, changes in self.overrides.items()
        }
        fields |= {name: str(fields[name]) for name in ("pattern", "device", "allocation")}
        pattern = self.target()
        fields["comparison_group"] = pattern.group if isinstance(pattern, Unstructured) else None
        if not isinstance(self.calibration, str | None):
            fields["calibration"] = str(self.calibration) if isinstance(self.calibration, Path) else "in memory"
        return fields


def require_known(options: Mapping[str, Any]) -> None:
    """Raise RecipeError, with the nearest known name, for an option that a recipe does not have."""
    known = ["preset", *(item.name for item in dataclasses.fields(Recipe))]
    for name in options:
        if name not in known:
            raise RecipeError(f"unknown option '{name}': {did_you_mean(name, known)}")


def _method_object(method: Method, options: Mapping[str, Any]) -> Method:
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        raise RecipeError(f"method must be a name or a method object, not {method!r}")
    if options:
        raise RecipeError(f"method_options go with a method's name; set them in {methods.name_of(method)} itself")
    return method
