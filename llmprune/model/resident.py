"""A model that is already in memory: its blocks stay where they lie and are pruned in place."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.errors import UnsupportedModelError
from llmprune.model.blocks import find_stages
from llmprune.model.configuration import is_causal_lm
from llmprune.model.sites import Site, Stage


class Resident:
    """The same interface as `Streamed`, for a loaded `PreTrainedModel`, also one that accelerate dispatched."""

    def __init__(self, model: Any) -> None:
        if not isinstance(model, PreTrainedModel):
            name = type(model).__name__
            raise UnsupportedModelError(f"'{name}' is no transformers model: give a folder, a Hub id or a loaded model")
        if not is_causal_lm(model):
            raise UnsupportedModelError(f"{type(model).__name__} is not a causal language model")
        if getattr(model.config, "quantization_config", None) is not None:
            raise UnsupportedModelError(f"{type(model).__name__} is quantized: prune the original checkpoint instead")
        self.model = model
        self.config, self.dtype = model.config, model.dtype
        _, self.blocks, self.embedding, self.head = find_stages(model)
        self._offloaded = _offloaded_weights(model)
        self.home = self.device = self.device_of(self.embedding)

    def device_of(self, stage: Stage) -> torch.device:
        """Return where a stage's arguments are expected; accelerate's hooks move them on from there."""
        hook = getattr(stage.module, "_hf_hook", None)
        devices = (getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook]))
        told = next((device for device in devices if device is not None), None)  # the first GPU is told as a plain 0
        device = torch.device(told) if told is not None else next(stage.module.parameters()).device
        return device if device.type != "meta" else torch.device("cpu")

    def load(self, stage: Stage) -> None:
        """Nothing to do: the block is there."""

    def free(self, stage: Stage) -> None:
        """Nothing to do: the block stays."""

    def keeping(self) -> AbstractContextManager[None]:
        """Nothing to do: all blocks stay."""
        return nullcontext()

    def weight(self, site: Site) -> Tensor:
        """Return the site's matrix [outputs, inputs], a view: writing to it changes the model."""
        return site.view(self._offloaded.get(site.tensor, site.module.get_parameter(site.parameter).data))


def _offloaded_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that accelerate keeps in CPU memory while their module's own are on the meta device."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            weights: Mapping[str, Tensor] | None = getattr(part, "weights_map", None)
            if weights is None:
                continue
            for name, parameter in module.named_parameters(recurse=bool(part.place_submodules)):
                if parameter.device.type == "meta":
                    _require_in_memory(weights, name)
                    found[f"{path}.{name}".lstrip(".")] = weights[name]
    return found


def _require_in_memory(weights: Any, name: str) -> None:
    """Weights offloaded to disk come as fresh copies: writing to those would be lost."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

    while isinstance(weights, PrefixedDataset):
        name, weights = weights.prefix + name, weights.dataset
    if isinstance(weights, OffloadedWeightsLoader) and name not in weights.state_dict:
        raise UnsupportedModelError(f"{name} is offloaded to disk: prune the checkpoint's folder or Hub id instead")
