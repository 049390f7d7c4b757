"""Teach transformers to load compressed checkpoints, without importing transformers for it.

Transformers is told as soon as its model classes have been imported: at once if they are there already, otherwise by
a finder that waits for that import, steps aside and lets it happen.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AWAITED = "transformers.modeling_utils"


def register() -> None:
    """Register the quantizer called `llmprune` with transformers, now or when that is imported."""
    if AWAITED in sys.modules:
        _tell_transformers()
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


def _tell_transformers() -> None:
    import_module("llmprune.sparse.quantizer")


class _Awaiting(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader)
        return spec


class _Telling(Loader):
    """Loads a module as its own loader does, then tells transformers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _tell_transformers()
