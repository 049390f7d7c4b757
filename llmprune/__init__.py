"""llmprune: prune Hugging Face causal language models after training, prove what it cost, write them out.

    report = llmprune.prune("org/model", "out", method="sparsegpt", pattern="2:4")
    result = llmprune.evaluate("out", data="wikitext2")
    preview = llmprune.plan("org/model", method="sparsegpt")
    solution = llmprune.solve(weight, inputs, method="wanda", pattern="50%")
    llmprune.sparsify(model)

Importing this package is cheap; torch and transformers are imported when they are first needed. Once it is imported,
`from_pretrained` of transformers also loads compressed checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmprune.sparse.register import register as _register

if TYPE_CHECKING:
    from llmprune import methods as methods
    from llmprune.errors import LlmpruneError as LlmpruneError
    from llmprune.inspection import inspect as inspect
    from llmprune.patterns import NM as NM
    from llmprune.patterns import Unstructured as Unstructured
    from llmprune.preview import Preview as Preview
    from llmprune.preview import plan as plan
    from llmprune.pruning import prune as prune
    from llmprune.publishing import push as push
    from llmprune.recipe import Recipe as Recipe
    from llmprune.report import Report as Report
    from llmprune.single import solve as solve
    from llmprune.sparse.quantizer import SparseConfig as SparseConfig
    from llmprune.sparse.sparsify import densify as densify
    from llmprune.sparse.sparsify import sparsify as sparsify
    from llmprune.statistics import ColumnNorm as ColumnNorm
    from llmprune.statistics import Gram as Gram
    from llmprune_eval.comparison import compare as compare
    from llmprune_eval.perplexity import evaluate as evaluate
    from llmprune_eval.sensitivity import sensitivity as sensitivity
    from llmprune_eval.sweep import sweep as sweep

_HOMES = {
    "ColumnNorm": "llmprune.statistics",
    "Gram": "llmprune.statistics",
    "LlmpruneError": "llmprune.errors",
    "NM": "llmprune.patterns",
    "Preview": "llmprune.preview",
    "Recipe": "llmprune.recipe",
    "Report": "llmprune.report",
    "SparseConfig": "llmprune.sparse.quantizer",
    "Unstructured": "llmprune.patterns",
    "compare": "llmprune_eval.comparison",
    "densify": "llmprune.sparse.sparsify",
    "evaluate": "llmprune_eval.perplexity",
    "inspect": "llmprune.inspection",
    "plan": "llmprune.preview",
    "prune": "llmprune.pruning",
    "push": "llmprune.publishing",
    "sensitivity": "llmprune_eval.sensitivity",
    "solve": "llmprune.single",
    "sweep": "llmprune_eval.sweep",
    "sparsify": "llmprune.sparse.sparsify",
}

__all__ = [*_HOMES, "methods"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is first asked for."""
    if name == "methods":
        return import_module("llmprune.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_register()
