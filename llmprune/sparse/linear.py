"""A linear layer whose weight is sparse, in the place of the dense one it stands for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import UnsupportedModelError
from llmprune.sparse.forms import Form, Step, default_steps, sparse_forms

EXPAND_FROM = 64  # tokens, where nothing was measured


class SparseLinear(nn.Module):
    """Stands for `nn.Linear`: the same input, output, bias, `weight` and state dict, in fewer bytes.

    The state dict holds the dense weight under its usual name, so it can be loaded into a dense model, or from one.
    Moved to another kind of device, cast, or loaded, the weight takes the preferred form there, unmeasured.

    Args:
        forms: the weight in one form, or in several for different numbers of tokens. The first gives the dense weight
            back: to the bit, unless it is cuSPARSELt's, which forgets the sign of zeros.
        steps: which kernel runs, by the number of tokens; the first step begins with 1.

    Raises:
        UnsupportedModelError: it is moved to a device or cast to a dtype that no sparse kernel serves.
    """

    def __init__(self, forms: Sequence[Form], bias: nn.Parameter | None, steps: Sequence[Step] = ()) -> None:
        super().__init__()
        self.in_features, self.out_features = forms[0].inputs, forms[0].outputs
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._hold(forms, steps)

    @property
    def weight(self) -> Tensor:
        """The dense weight [outputs, inputs], made anew each time."""
        return self.forms[0].expand()

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., inputs] times the transposed weight, plus the bias: [..., outputs].

        Within autocast x is cast to the weight's dtype; otherwise it must have that.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.forms[0].dtype)
        tokens = x.numel() // self.in_features
        now = self.steps[0]
        for step in self.steps[1:]:
            if tokens >= step.tokens:
                now = step
        return self.forms[now.place].linear(x, now.kernel, now.setting, self.bias)

    def dense(self) -> nn.Linear:
        """Return the dense layer that this one stands for."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.forms[0].dtype)
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.register_parameter("bias", self.get_parameter("bias") if self.bias is not None else None)
        return layer

    def nbytes(self) -> int:
        """Return the bytes that the weight occupies, in all its forms."""
        return sum(form.nbytes() for form in self.forms)

    def extra_repr(self) -> str:
        """Return what `print` shows between the brackets."""
        share = self.forms[0].nbytes() / (self.in_features * self.out_features * self.forms[0].dtype.itemsize)
        kernels = ", ".join(f"{step.kernel} from {step.tokens}" for step in self.steps)
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={share:.2f}, {kernels}"

    def _hold(self, forms: Sequence[Form], steps: Sequence[Step] = ()) -> None:
        # Plain attributes: transformers would fill buffers that no checkpoint has with values of its own.
        self.forms = tuple(forms)
        self.steps = tuple(steps) or default_steps(self.forms, EXPAND_FROM)

    def _hold_weight(self, weight_OI: Tensor) -> None:
        """Hold another weight: in the same forms if they suit it, otherwise in the one that is preferred."""
        suitable = sparse_forms(weight_OI)
        if not suitable:
            raise UnsupportedModelError(
                f"sparse layers run on CPUs and CUDA GPUs in float32, bfloat16 or float16, not on {weight_OI.device} "
                f"in {weight_OI.dtype}: call llmprune.densify(model) first"
            )
        first = type(self.forms[0])
        if first in suitable and len(self.forms) == 1:
            self._hold([first.of(weight_OI)], self.steps)
        else:
            self._hold([suitable[0].of(weight_OI)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.forms[0].tensors[0].device
        probe = fn(torch.empty(0, dtype=self.forms[0].dtype, device=device))
        if (probe.device.type, probe.dtype) == (device.type, self.forms[0].dtype):
            self._hold([form.moved(fn) for form in self.forms], self.steps)
        else:
            self._hold_weight(fn(self.weight))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and tuple(weight.shape) == (self.out_features, self.in_features):
            self._hold_weight(weight.to(self.forms[0].tensors[0].device, self.forms[0].dtype))
            state_dict = {name: value for name, value in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(state_dict, prefix, *rest)
