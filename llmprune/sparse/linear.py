"""A linear layer whose weight is sparse, in the place of the dense one it stands for."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from llmprune.errors import UnsupportedModelError
from llmprune_kernels.bitmask.layout import TYPES, Tiles, expand
from llmprune_kernels.bitmask.ops import bitmask_linear

EXPAND_FROM = 64  # tokens, where nothing was measured


class SparseLinear(nn.Module):
    """Stands for `nn.Linear`: the same input, output, bias, `weight` and state dict, in fewer bytes.

    The state dict holds the dense weight under its usual name, so it can be loaded into a dense model, or from one.

    Raises:
        UnsupportedModelError: it is moved to a device or cast to a dtype that no sparse kernel serves.
    """

    def __init__(self, tiles: Tiles, bias: nn.Parameter | None, expand_from: int = EXPAND_FROM) -> None:
        super().__init__()
        self.in_features, self.out_features = tiles.inputs, tiles.outputs
        self.expand_from = expand_from
        self.register_parameter("bias", bias)
        self._hold(tiles)

    @property
    def tiles(self) -> Tiles:
        """The weight as it is kept."""
        return Tiles(self._masks, self._values, self._offsets, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The dense weight [outputs, inputs], made anew each time."""
        return expand(self.tiles)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., inputs] times the transposed weight, plus the bias: [..., outputs]."""
        product: Tensor = bitmask_linear(
            x, self._masks, self._values, self._offsets, self.out_features, self.bias, self.expand_from
        )
        return product

    def dense(self) -> nn.Linear:
        """Return the dense layer that this one stands for."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self._values.dtype)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.register_parameter("bias", self.get_parameter("bias") if self.bias is not None else None)
        return layer

    def extra_repr(self) -> str:
        """Return what `print` shows between the brackets."""
        share = 1 - self._values.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={share:.2f}"

    def _hold(self, tiles: Tiles) -> None:
        # Plain attributes: transformers would fill buffers that no checkpoint has with values of its own.
        self._masks, self._values, self._offsets = tiles.masks, tiles.values, tiles.offsets

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        values = fn(self._values)
        if values.device.type != "cpu" or values.dtype not in TYPES:
            raise UnsupportedModelError(
                f"sparse layers run on the CPU in float32, bfloat16 or float16, not on {values.device} in "
                f"{values.dtype}: call llmprune.densify(model) first"
            )
        self._values = values
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and tuple(weight.shape) == (self.out_features, self.in_features):
            self._hold(Tiles.pack(weight.to("cpu", self._values.dtype)))
            state_dict = {name: value for name, value in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(state_dict, prefix, *rest)
