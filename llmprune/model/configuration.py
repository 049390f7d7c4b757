"""What kind of model a checkpoint holds, as its configuration tells: refused here, before anything is loaded."""

from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    __version__,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune.checkpoint.format import is_compressed
from llmprune.errors import CheckpointError, UnsupportedModelError, did_you_mean, first_line


def read_config(folder: Path, fields: dict[str, Any], trust_remote_code: bool) -> Any:
    """Return the configuration of a model folder as transformers reads it; `fields` are those of its source's.

    Raises:
        CheckpointError: the checkpoint is quantized.
        UnsupportedModelError: it is not a causal language model, or needs code of its own and that is not allowed.
    """
    require_not_quantized(folder, fields)
    _require_known_type(folder, fields, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # configurations check themselves, each with errors of its own
        raise UnsupportedModelError(f"{folder}/config.json is not understood: {first_line(error)}") from None
    if not fields.get("quantization_config"):  # `fields` are those of the dense twin of a compressed checkpoint
        vars(config).pop("quantization_config", None)
    _require_causal(folder, fields, config, trust_remote_code)
    return config


def unknown_fields(fields: dict[str, Any], config: Any) -> list[str]:
    """Return the fields of the checkpoint's config.json that transformers keeps but has no use for."""
    try:
        default = type(config)()
    except Exception:  # a few classes, each with an error of its own, have no defaults to compare with
        return []
    known = vars(default).keys() | dir(type(config))
    return [field for field in fields if field in vars(config) and field not in known]


def require_not_quantized(folder: Path, fields: dict[str, Any]) -> None:
    """Raise CheckpointError for a checkpoint that is quantized, or compressed, by its config.json."""
    if is_compressed(fields):
        raise CheckpointError(f"{folder} was compressed by llmprune: restore it with llmprune decompress {folder} OUT")
    parts = [fields, *(part for part in fields.values() if isinstance(part, dict))]
    if any(part.get("quantization_config") or part.get("compression_config") for part in parts):
        raise CheckpointError(f"{folder} is already quantized: prune the original checkpoint, then quantize")


def _require_known_type(folder: Path, fields: dict[str, Any], trust_remote_code: bool) -> None:
    model_type = str(fields.get("model_type"))
    if model_type in CONFIG_MAPPING or ("auto_map" in fields and trust_remote_code):
        return
    if "auto_map" in fields:
        raise UnsupportedModelError(f"{folder} runs code of its own; read it, then allow it with --trust-remote-code")
    raise UnsupportedModelError(
        f"{folder} is of type '{model_type}', which transformers {__version__} does not know: "
        f"{did_you_mean(model_type, CONFIG_MAPPING)}"
    )


def _require_causal(folder: Path, fields: dict[str, Any], config: Any, trust_remote_code: bool) -> None:
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModelError(f"{folder} is a '{config.model_type}' model, not a causal language model")
    architectures = _architectures(folder, fields)
    known = _causal_classes(config)
    if architectures and not known & set(architectures):
        raise UnsupportedModelError(
            f"{folder} is a {architectures[0]}, not a causal language model ({', '.join(sorted(known))})"
        )


def _architectures(folder: Path, fields: dict[str, Any]) -> list[str]:
    named = fields.get("architectures") or []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UnsupportedModelError(f"{folder}/config.json is not understood: architectures must be names")
    return named


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Say whether a loaded model is one; code that came with a model is taken at its word."""
    if type(model).__module__.startswith("transformers_modules."):
        return True
    # The text part of a multimodal model has a configuration of its own, which no auto class knows.
    parts = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _flat(names)}
    known = _causal_classes(model.config) | parts
    return any(parent.__name__ in known for parent in type(model).__mro__)


def _causal_classes(config: Any) -> set[str]:
    """Return the names of the classes whose checkpoints hold a causal language model, multimodal ones as a part."""
    mappings = AutoModelForCausalLM._model_mapping, AutoModelForImageTextToText._model_mapping
    if type(config) not in mappings[0]:
        return set()
    found = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    return {cls.__name__ for classes in found for cls in _flat(classes)}


def _flat(one_or_several: Any) -> tuple[Any, ...]:
    return one_or_several if isinstance(one_or_several, tuple) else (one_or_several,)
