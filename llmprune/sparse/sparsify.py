"""Swap the linear layers of a loaded model for sparse ones, where that is measured to be no slower."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from llmprune.progress import Progress
from llmprune.sparse.experts import ExpertsChoice, densify_experts, sparsify_experts
from llmprune.sparse.forms import Dense, Form, Step, forms_beside, is_worth, obstacle, sparse_forms
from llmprune.sparse.gate import SAMPLE_BYTES, TOKENS, Timing, Verdict, judge
from llmprune.sparse.linear import SparseLinear
from llmprune.sparse.machine import machine_of
from llmprune.sparse.stacks import SparseExperts
from llmprune_kernels.bitmask.layout import count_values


@dataclass(frozen=True)
class Choice:
    """What became of the linear layers of one shape.

    Attributes:
        kernel: what runs at the asked number of tokens, "dense" with the reason.
        steps: what runs from which number of tokens on; empty where the layers are dense.
        bytes: of their weights, dense and as they are now.
        timings: seconds for each number of tokens, by implementation; empty where nothing was measured.
    """

    shape: tuple[int, int]
    dtype: str
    layers: int
    kernel: str
    reason: str
    bytes: tuple[int, int]
    timings: tuple[Timing, ...]
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        others = ", ".join(f"{step.kernel} from {step.tokens} tokens" for step in self.steps[1:])
        kernels = self.kernel + (f"; {others}" if others else "")
        return f"{self.layers:4} x {self.shape[0]} x {self.shape[1]} {self.dtype}: {kernels} ({self.reason})"


@dataclass(frozen=True)
class Sparsified:
    """The choices for a model, shape by shape, and for its fused experts."""

    choices: list[Choice]
    experts: list[ExpertsChoice]

    @property
    def sparse_layers(self) -> int:
        """Linear layers and modules of experts that are sparse now."""
        layers = sum(choice.layers for choice in self.choices if choice.kernel != "dense")
        return layers + sum(choice.modules for choice in self.experts if choice.kernel != "dense")

    def to_json(self) -> dict[str, Any]:
        """Return the choices as plain values."""
        return {
            "choices": [asdict(choice) for choice in self.choices],
            "experts": [asdict(choice) for choice in self.experts],
        }

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.choices, *self.experts]))


def sparsify(model: nn.Module, *, batch: int = 1, prompt_tokens: int | None = None, graphs: bool = False) -> Sparsified:
    """Make the linear layers of a model sparse, in place, where that is no slower at `batch` tokens a step.

    Layers that are sparse already are measured too, and made dense where that is faster. Layers whose weight is tied
    to another's, lies on a device without sparse kernels or has too few zeros stay as they are. Fused experts on the
    CPU are measured and swapped as whole modules.

    Args:
        model: any module; what `generate`, `state_dict` and `torch.compile` do with it keeps working.
        batch: tokens a forward, which is the number of sequences while decoding.
        prompt_tokens: be no slower than dense with this many tokens in a forward either, even if a second form of the
            weight must be kept for that: it may be the dense one. By default the form for `batch` serves all.
        graphs: the model will run as CUDA graphs: measure kernels without what it takes to start them one by one.
    """
    asked = (batch,) if prompt_tokens is None else (batch, prompt_tokens)
    groups: dict[_Kind, list[str]] = defaultdict(list)
    for name, layer in _linear_layers(model).items():
        groups[_Kind.of(layer)].append(name)
    choices = []
    with Progress(len(groups), "measuring layers", "shape") as bar:
        for kind, names in groups.items():
            choices.append(
                kind.choice(names, kind.obstacle) if kind.obstacle else _choose(model, kind, names, asked, graphs)
            )
            bar.step()
    return Sparsified(choices, sparsify_experts(model, batch))


def densify(model: nn.Module) -> None:
    """Make all sparse layers of a model dense again, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear):
            model.set_submodule(name, layer.dense())
    densify_experts(model)


def count_sparse(model: nn.Module) -> int:
    """Return how many layers of a model are sparse."""
    return sum(isinstance(layer, SparseLinear | SparseExperts) for layer in model.modules())


def hold_sparse(model: nn.Module, parameter: str, form: Form) -> bool:
    """Put a sparse layer with this weight where the model has a linear one like it; say whether that was possible."""
    path, _, attribute = parameter.rpartition(".")
    layer: Any = model.get_submodule(path)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    fits = type(layer) is nn.Linear and attribute == "weight" and layer.weight.shape == (form.outputs, form.inputs)
    if not fits or parameter in {*tied, *tied.values()} or obstacle(form.dtype, form.device) is not None:
        return False
    if not is_worth(form.share(), form.dtype):
        return False
    model.set_submodule(path, SparseLinear([form], layer.bias))
    return True


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers, sparse or dense, whose weight is no other layer's as well."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear) or (type(layer) is nn.Linear and uses[id(layer.weight)] == 1)
    }


@dataclass(frozen=True)
class _Kind:
    """What layers must have in common to be measured together."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    obstacle: str | None
    forms: tuple[type[Form], ...] = ()

    @classmethod
    def of(cls, layer: Any) -> "_Kind":
        """Return the kind of a layer, sparse or dense."""
        if isinstance(layer, SparseLinear):
            form = layer.forms[0]
            found = obstacle(form.dtype, form.device)
            forms = () if found else tuple(forms_beside(form))
            return cls((form.outputs, form.inputs), form.dtype, form.device, found, forms)
        weight = layer.weight.detach()
        found = obstacle(weight.dtype, weight.device)
        if found is None and not is_worth(int(count_values(weight).sum()) / weight.numel(), weight.dtype):
            found = "too few zeros"
        forms = () if found else tuple(sparse_forms(weight))
        return cls((weight.shape[0], weight.shape[1]), weight.dtype, weight.device, found, forms)

    @property
    def nbytes(self) -> int:
        """Bytes of a dense weight."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def choice(self, names: list[str], reason: str, **how: Any) -> Choice:
        """Return a choice for the layers with these names; dense, unless `how` says otherwise."""
        dense = len(names) * self.nbytes
        fields: dict[str, Any] = {"kernel": "dense", "bytes": (dense, dense), "timings": (), **how}
        return Choice(self.shape, str(self.dtype).removeprefix("torch."), len(names), reason=reason, **fields)


def _choose(model: nn.Module, kind: _Kind, names: list[str], asked: tuple[int, ...], graphs: bool) -> Choice:
    """Measure a sample of layers of one kind, and make all of them what was faster."""
    verdict = _measured(model, kind, names, asked, graphs)
    fastest = {verdict.fastest(tokens) for tokens in asked}
    forms: list[type[Form]] = [*kind.forms, Dense]
    kept = sorted((form for form in forms if fastest & {*form.kernels}), key=lambda form: not form.exact)
    if kept == [Dense]:
        for name in names:
            layer = model.get_submodule(name)
            model.set_submodule(name, layer.dense() if isinstance(layer, SparseLinear) else layer)
        return kind.choice(names, "measured faster", timings=verdict.timings)
    steps = verdict.steps([form.kernels for form in kept])
    used = 0
    for name in names:
        layer = _sparse(model.get_submodule(name), kept, steps)
        model.set_submodule(name, layer)
        used += layer.nbytes()
    sizes = (len(names) * kind.nbytes, used)
    return kind.choice(
        names, "measured faster", kernel=verdict.fastest(asked[0]), bytes=sizes, timings=verdict.timings, steps=steps
    )


def _measured(model: nn.Module, kind: _Kind, names: list[str], asked: tuple[int, ...], graphs: bool) -> Verdict:
    sample: list[Any] = [model.get_submodule(name) for name in names[: max(1, SAMPLE_BYTES // kind.nbytes)]]
    packed = [[_in_form(layer, form) for layer in sample] for form in kind.forms]
    return judge(
        packed, lambda: [layer.weight.detach() for layer in sample], (*TOKENS, *asked), machine_of(kind.device, graphs)
    )


def _sparse(layer: Any, kept: list[type[Form]], steps: tuple[Step, ...]) -> SparseLinear:
    return SparseLinear([_in_form(layer, form) for form in kept], layer.bias, steps)


def _in_form(layer: Any, kind: type[Form]) -> Form:
    """Return a layer's weight in a form: as it is, if it has that already."""
    held = layer.forms if isinstance(layer, SparseLinear) else ()
    return next((form for form in held if type(form) is kind), None) or kind.of(layer.weight)
