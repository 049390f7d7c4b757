"""A GPU that computes nothing: tensors on it have a shape, a dtype and a device, but no values.

So code takes its way for GPUs on a machine without one; every operation that it starts is noted; and reading a value
back, for which the host would have to wait, is an error.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_FREE = ("prim.", "unsqueeze", "unsafe_view", "view", "slice", "select", "transpose", "t.", "expand", "squeeze", "detach", "alias", "diagonal", "permute",
         "split", "unbind", "as_strided", "empty", "reshape", "narrow")  # fmt: skip


class Launches(TorchDispatchMode):
    """Context manager: counts the operations that a GPU is given to do, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.lstrip("_").startswith(_FREE):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_gpu() -> Iterator[Launches]:
    """Let `device="cuda"` be a GPU without values; tensors from outside cannot be used inside."""
    with FakeTensorMode(), _Operators(), Launches() as launches:
        yield launches


class _Operators(TorchFunctionMode):
    """Builds of torch without CUDA refuse what claims to be on a GPU in Python's own bindings; the operators take it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            return _part(*args)
        if func is Tensor.__setitem__:
            part = _part(*args[:2])
            return torch.ops.aten.copy_(part, args[2]) if isinstance(args[2], Tensor) else part.fill_(args[2])
        if dtype := _CASTS.get(func):
            return args[0].to(dtype)
        name = {"__invert__": "bitwise_not", "to": "to"}.get(func.__name__, func.__name__)
        if name in ("bitwise_not", "contiguous", "copy_", "to"):
            return getattr(torch.ops.aten, name)(*args, **kwargs)
        return func(*args, **kwargs)


_CASTS = {Tensor.float: torch.float32, Tensor.long: torch.int64, Tensor.double: torch.float64}


def _part(whole: Tensor, index: Any) -> Tensor:
    dimension = 0
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, Tensor):
            assert dimension == 0 and not isinstance(index, tuple)
            rows: Tensor = torch.ops.aten.index(whole, [item])
            return rows
        if isinstance(item, slice):
            start, stop, _ = item.indices(whole.shape[dimension])
            whole = whole.narrow(dimension, start, max(stop - start, 0))
            dimension += 1
        elif item is None:
            whole = whole.unsqueeze(dimension)
            dimension += 1
        else:
            whole = whole.select(dimension, item)
    return whole
