"""How much memory tensors take while some code runs, counted tensor by tensor."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager: counts the bytes of the tensors that are made inside, and of those still alive.

    What an operation needs only within itself (the workspace of a factorisation) is not seen.

    Attributes:
        now: bytes alive at this moment.
        peak: the most bytes alive at any moment so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # views, and what is changed in place
        for storage in _storages(output):
            if storage._cdata not in given:
                self._count(storage)
        return output

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def bytes_of(values: Any) -> int:
    """Return the bytes of the tensors in a nesting of values, counting those that share their memory once."""
    return sum({storage._cdata: storage.nbytes() for storage in _storages(values)}.values())
