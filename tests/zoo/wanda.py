"""Wanda on a whole model in memory, by plain hooks: what the masks of a streamed run must be."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tiny
from llmprune.model.blocks import find_blocks
from llmprune.report import Report


class Wrong(Exception):
    """What llmprune made is not what it should be."""


def require(holds: bool, what: str) -> None:
    """Raise Wrong, saying what is wrong, unless it holds."""
    if not holds:
        raise Wrong(what)


def require_wanda(dense: Any, pruned: Any, report: Report, ids: Tensor) -> int:
    """Raise Wrong unless the masks are those of Wanda (arXiv:2306.11695, eq. 1) on the whole model, by plain hooks.

    Block after block: the inputs are those of the model whose earlier blocks are pruned. Returns the number of sites
    that hooks see; an expert's slice is not one.
    """
    blocks_name, blocks = find_blocks(dense)
    linear = {
        f"{name}.weight": module for name, module in dense.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    seen = 0
    for index, block in enumerate(blocks):
        prefix = f"{blocks_name}.{index}."
        here = [s.name for s in report.sites if s.name.startswith(prefix) and s.name in linear and not s.notes]
        norms = _input_norms(dense, {name: linear[name] for name in here}, ids)
        for name, norm_I in norms.items():
            transposed = isinstance(linear[name], Conv1D)
            weight, kept = linear[name].weight.detach(), pruned.get_parameter(name) != 0
            score_OI = (weight.T if transposed else weight).abs() * norm_I
            _require_lowest(name, score_OI, kept.T if transposed else kept)
        seen += len(norms)
        block.load_state_dict(pruned.get_submodule(f"{blocks_name}.{index}").state_dict())
    return seen


def _input_norms(model: Any, modules: dict[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """Return the norm of every input feature, over all tokens, of the modules that are called."""
    squares: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            squares[name] = squares.get(name, 0) + x_TI.square().sum(0)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    tiny.logits(model, ids)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt() for name, total in squares.items()}


def _require_lowest(name: str, score_OI: Tensor, kept_OI: Tensor) -> None:
    largest_removed_O = score_OI.masked_fill(kept_OI, 0).amax(1)
    smallest_kept_O = score_OI.masked_fill(~kept_OI, float("inf")).amin(1)
    require(bool((largest_removed_O <= smallest_kept_O * 1.001).all()), f"{name}: the mask is not Wanda's")
