"""A tiny model of every causal language model that the installed transformers has."""

from itertools import cycle, islice
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from zoo.overrides import OVERRIDES
from zoo.sizes import DERIVED, LAYERS, ORDINARY_TOKENS, SIZES, TOKENS

__all__ = ["NAMES", "ORDINARY_TOKENS", "WRITTEN_FOR", "config", "model"]

WRITTEN_FOR = "5.23"  # the transformers whose configurations these are: a few cannot be built by others

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(name: str) -> Any:
    """Return a tiny configuration of a model type."""
    config_class = CONFIG_MAPPING[name]
    default = config_class()
    parts = {part for part in config_class.sub_configs if getattr(default, part, None) is not None}
    fields = {field: shrunk(value) if field in parts else value for field, value in default.to_dict().items()}
    changes = dict(OVERRIDES.get(name, {}))
    for part in parts & changes.keys():
        fields[part] |= changes.pop(part)
    made = config_class(
        **shrunk({f: v for f, v in fields.items() if f not in parts}) | {p: fields[p] for p in parts} | changes
    )
    made.use_cache = False
    return made


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration with small numbers in place of large ones."""
    return {
        field: _shrunk(field, value)
        for field, value in fields.items()
        if field not in DERIVED and not field.startswith("_")
    }


def _shrunk(field: str, value: Any) -> Any:
    if field == "layer_types" and value:
        return list(islice(cycle(dict.fromkeys(value)), LAYERS))
    if field == "is_decoder":
        return True
    if value is None or isinstance(value, bool | str):
        return value
    if field in TOKENS:
        return TOKENS[field]
    if field in SIZES and isinstance(value, int | float):
        return min(SIZES[field], value)
    return value


def _holder(name: str) -> Any:
    """Return the kind of model whose checkpoints are on the Hub: a multimodal one where the text model is its part."""
    text_only = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name].endswith("ForCausalLM")
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(name, "")
    return (
        AutoModelForImageTextToText
        if text_only and whole.endswith("ForConditionalGeneration")
        else AutoModelForCausalLM
    )


def model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a tiny model with random weights."""
    torch.manual_seed(0)
    made: PreTrainedModel = _holder(name).from_config(config(name), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08, generator=generator)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    made.eval()
    return made
