"""Swap the linear layers of a loaded model for sparse ones, where that is measured to be no slower."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from llmprune.progress import Progress
from llmprune.sparse.experts import ExpertsChoice, densify_experts, sparsify_experts
from llmprune.sparse.gate import TOKENS, Timing, Verdict, judge
from llmprune.sparse.linear import SparseLinear
from llmprune.sparse.stacks import SparseExperts
from llmprune_kernels.bitmask.layout import TYPES, Tiles
from llmprune_kernels.native import library

_SAMPLE_BYTES = 256 << 20  # dense weights of one shape that are measured: more than a processor's cache holds
_WORTH = 0.95  # of the dense bytes: what a layer must shrink to


@dataclass(frozen=True)
class Choice:
    """What became of the linear layers of one shape.

    Attributes:
        kernel: "bitmask", or "dense" with the reason.
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
        lines = [
            f"{choice.layers:4} x {choice.shape[0]} x {choice.shape[1]} {choice.dtype}: {choice.kernel} ({choice.reason})"
            for choice in self.choices
        ]
        return "\n".join([*lines, *map(str, self.experts)])


def sparsify(model: nn.Module, *, batch: int = 1) -> Sparsified:
    """Make the linear layers of a model on the CPU sparse, in place, where that is no slower at `batch` tokens a step.

    Layers that are sparse already are measured too, and made dense where that is faster. Layers whose weight is tied
    to another's, lies on another device or has too few zeros stay as they are. Fused experts are measured and swapped
    as whole modules.

    Args:
        model: any module; what `generate`, `state_dict` and `torch.compile` do with it keeps working.
        batch: tokens a forward, which is the number of sequences while decoding.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
    for name, layer in _linear_layers(model).items():
        weight = layer.weight
        groups[tuple(weight.shape), weight.dtype, _obstacle(layer, weight)][name] = layer
    choices = []
    with Progress(len(groups), "measuring layers", "shape") as bar:
        for (_, _, obstacle), layers in groups.items():
            choices.append(_choose(model, layers, batch) if obstacle is None else _left_dense(layers, obstacle))
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


def make_sparse(model: nn.Module, parameter: str, weight_OI: Tensor) -> bool:
    """Put a sparse layer with this weight where the model has a linear one; say whether that was possible."""
    path, _, attribute = parameter.rpartition(".")
    layer = model.get_submodule(path)
    if type(layer) is not nn.Linear or attribute != "weight" or _obstacle(layer, weight_OI) is not None:
        return False
    model.set_submodule(path, SparseLinear(Tiles.pack(weight_OI), layer.bias))
    return True


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers, sparse or dense, whose weight is no other layer's as well."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseLinear) or (type(layer) is nn.Linear and uses[id(layer.weight)] == 1)
    }


def _obstacle(layer: nn.Module, weight: Tensor) -> str | None:
    """Return why a layer cannot be sparse, None if it can."""
    if weight.device.type != "cpu":
        return f"on {weight.device.type}, where there is no sparse kernel yet"
    if weight.dtype not in TYPES:
        return "a dtype without a sparse kernel"
    if library() is None:
        return "no compiled kernels"
    if not isinstance(layer, SparseLinear) and _packed_share(weight) > _WORTH:
        return "too few zeros"
    return None


def _packed_share(weight: Tensor) -> float:
    """Return the bytes of the weight in tiles over those it has."""
    values = sum(int(rows.count_nonzero()) for rows in weight.split(1024))
    return values / weight.numel() + 1 / (8 * weight.element_size())


def _choose(model: nn.Module, layers: dict[str, Any], batch: int) -> Choice:
    """Measure a sample of layers of one shape, and make all of them what was faster."""
    first = next(iter(layers.values())).weight
    sample = list(layers.values())[: max(1, _SAMPLE_BYTES // first.nbytes)]
    verdict = judge([layer.weight for layer in sample], [_tiles(layer) for layer in sample], (*TOKENS, batch))
    if verdict.slower_than_dense(batch):
        for name, layer in layers.items():
            model.set_submodule(name, layer.dense() if isinstance(layer, SparseLinear) else layer)
        return _left_dense(layers, "measured faster", verdict)
    used = 0
    for name, layer in layers.items():
        tiles = _tiles(layer)
        model.set_submodule(name, SparseLinear(tiles, layer.bias, verdict.expand_from()))
        used += tiles.nbytes()
    nbytes = (len(layers) * first.nbytes, used)
    return _choice(layers, first, "bitmask", "measured faster", nbytes, verdict)


def _left_dense(layers: dict[str, Any], reason: str, verdict: Verdict | None = None) -> Choice:
    first = next(iter(layers.values())).weight
    nbytes = len(layers) * first.nbytes
    return _choice(layers, first, "dense", reason, (nbytes, nbytes), verdict)


def _choice(
    layers: dict[str, Any], weight: Tensor, kernel: str, reason: str, nbytes: tuple[int, int], verdict: Verdict | None
) -> Choice:
    shape = (weight.shape[0], weight.shape[1])
    dtype = str(weight.dtype).removeprefix("torch.")
    return Choice(shape, dtype, len(layers), kernel, reason, nbytes, verdict.timings if verdict else ())


def _tiles(layer: Any) -> Tiles:
    return layer.tiles if isinstance(layer, SparseLinear) else Tiles.pack(layer.weight.detach())
