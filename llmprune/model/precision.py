"""The precision in which a forward multiplies, where that is not its weights' own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def multiplying_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Have a forward multiply matrices in `dtype`, by torch.autocast; without its cache, as weights change meanwhile."""
    with torch.autocast(device.type, dtype, cache_enabled=False), _ConvertedWrites():
        yield


_WRITES = {
    Tensor.__setitem__,
    Tensor.index_add,
    Tensor.index_add_,
    Tensor.index_copy_,
    Tensor.index_put_,
    Tensor.masked_scatter_,
    Tensor.scatter_,
    Tensor.scatter_add_,
}


class _ConvertedWrites(TorchFunctionMode):
    """What is written into part of a tensor takes on its dtype.

    Copying converts; these operations refuse. A forward written for one dtype meets that where autocast has some of
    its products in another, as experts do whose outputs are summed up where their tokens stand.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WRITES:
            into = args[0].dtype
            args = tuple(_in_dtype(value, into) for value in args)
            kwargs = {name: _in_dtype(value, into) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return a tensor of floating point numbers in another such dtype; anything else as it is."""
    convertible = isinstance(value, Tensor) and value.is_floating_point() and dtype.is_floating_point
    return value.to(dtype) if convertible else value
