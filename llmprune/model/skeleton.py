"""A transformers model without weights, and the functions of transformers that fill parts of it.

This is the one module that uses semi-private functions of transformers (5.17 to 5.23): what `from_pretrained` does
for a whole model, done for a few tensors at a time.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, initialization
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from llmprune.checkpoint import Source
from llmprune.errors import CheckpointError, UnsupportedModelError, first_line
from llmprune.model.memory import is_out_of_memory
from llmprune.model.ties import Ties, untied


def empty_model(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model with all of it on the meta device."""
    try:
        with quiet(), torch.device("meta"), initialization.meta_device_safe_creation_ops():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # whatever a model's own code raises on values that make no sense
        raise UnsupportedModelError(f"no model can be built from config.json: {first_line(error)}") from None
    model.eval()
    return model


class Loader:
    """Reads tensors of a source into an empty model, a few at a time, and names them back."""

    def __init__(self, source: Source, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._source, self._model, self._dtype = source, model, dtype
        self._mapping = get_model_conversion_mapping(model)
        self._renamed: dict[str, str] = {}  # parameters that are one tensor of the source as it stands: its name there
        self.parameter_of = self._map_names()
        self._untie()
        self.ties = Ties(model.all_tied_weights_keys, self.parameter_of.values())
        if not any(isinstance(entry, WeightConverter) for entry in self._mapping):
            self._require_all()  # converters make parameters that no tensor of the source is named after

    def load(self, names: list[str], device: torch.device, source: Source | None = None, mapped: bool = False) -> None:
        """Read the tensors called `names` in the source into the model, on `device`; `source` stands in for it.

        Where they are `mapped`, what nobody looks at takes no memory.

        Raises:
            CheckpointError: they do not fit the model.
            RuntimeError, MemoryError: memory runs out.
        """
        if not names:
            return
        config = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            weight_mapping=copy.deepcopy(self._mapping),  # type: ignore[arg-type]
            device_map={"": str(device)},
        )
        copied = set() if mapped or device.type != "cpu" else self._as_they_stand
        with quiet(), (source or self._source).slices(names, copied) as opened:
            info, _ = convert_and_load_state_dict_in_model(self._model, opened, config)
        # Transformers takes note of whatever ends a conversion, such as that of experts to one tensor, and goes on.
        if any(is_out_of_memory(RuntimeError(said)) for said in info.conversion_errors.values()):
            raise MemoryError
        faults = [*info.mismatched_keys, *info.conversion_errors]
        if faults:
            raise CheckpointError(f"{self._source.folder}: {first_line(faults[0])} does not fit the model's config")

    @cached_property
    def _as_they_stand(self) -> set[str]:
        """The tensors of the source that become parameters without a copy being made."""
        return {key for key in self._renamed.values() if self._source.entries[key].torch_dtype == self._dtype}

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters of the model as the tensors, and under the names, that the source has for them."""
        plain = {self._renamed[name]: tensor for name, tensor in tensors.items() if name in self._renamed}
        converted = {name: tensor for name, tensor in tensors.items() if name not in self._renamed}
        return plain | dict(revert_weight_conversion(self._model, converted))

    def _map_names(self) -> dict[str, str]:
        """Return, for each tensor of the source that the model uses, the parameter or buffer it goes to."""
        known = self._model.state_dict()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        mapped = {}
        for key in self._source.entries:
            name, converter = rename_source_key(key, renamings, converters, prefix, known)
            name, converter = (name, converter) if name in known else (key, None)
            if name in known:
                mapped[key] = name
                if converter is None:
                    self._renamed[name] = key
        self._require_dtypes(known, mapped)
        self._require_shapes(known)
        self._require_sizes(known, mapped)
        return mapped

    def _require_dtypes(self, known: dict[str, Tensor], mapped: dict[str, str]) -> None:
        for key, name in mapped.items():
            stored = self._source.entries[key].torch_dtype
            if known[name].is_floating_point() and not stored.is_floating_point:
                raise CheckpointError(f"{key} is stored as {stored}: dequantize the checkpoint first")

    def _require_shapes(self, known: dict[str, Tensor]) -> None:
        for name, key in self._renamed.items():
            stored, expected = self._source.entries[key].shape, tuple(known[name].shape)
            if stored != expected:
                raise CheckpointError(f"{key} has shape {list(stored)}, the config asks for {list(expected)}")

    def _require_sizes(self, known: dict[str, Tensor], mapped: dict[str, str]) -> None:
        """A parameter that is made of several tensors, such as fused experts, cannot hold more than they do."""
        stored: Counter[str] = Counter()
        for key, name in mapped.items():
            stored[name] += self._source.entries[key].count
        for name, count in stored.items():
            if known[name].numel() > count:
                asked = list(known[name].shape)
                raise CheckpointError(f"{name} does not fit the model's config: it asks for {asked}, {count} are there")

    def _require_all(self) -> None:
        stored = set(self.parameter_of.values())
        missing = [name for name in self._model.state_dict() if self.ties.stored_name(name) not in stored]
        if missing:
            raise CheckpointError(f"{self._source.folder} lacks the tensor {min(missing)} that its config asks for")

    def _untie(self) -> None:
        """Forget ties between parameters that the source stores with different contents, as `from_pretrained` does."""
        for name in untied(self._model.all_tied_weights_keys, self.parameter_of.values(), self._same):
            del self._model.all_tied_weights_keys[name]

    def _same(self, a: str, b: str) -> bool:
        chunks = [self._source.chunks(self._renamed[name]) for name in (a, b) if name in self._renamed]
        return len(chunks) < 2 or all(torch.equal(x, y) for x, y in zip(*chunks, strict=True))


def merged_on_load(model: PreTrainedModel) -> list[str]:
    """Return the parameters that are put together from several tensors of a checkpoint, or made from another one."""
    converters = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightConverter)]
    targets = [pattern for converter in converters for pattern in converter.target_patterns]
    return [name for name, _ in model.named_parameters() if any(target in name for target in targets)]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and notices off the terminal: ours tell how far a run is."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def fill_buffers(model: PreTrainedModel) -> None:
    """Compute, in CPU memory, the buffers that no checkpoint stores (rotary tables, masks), as `from_pretrained` does.

    Raises:
        UnsupportedModelError: the configuration asks for buffers that make no sense.
    """
    try:
        with torch.no_grad(), initialization.guard_torch_init_functions():
            for module in model.modules():
                for name in module._non_persistent_buffers_set:
                    buffer = module._buffers.get(name)
                    if buffer is not None:
                        module._buffers[name] = torch.empty_like(buffer, device="cpu")
            for module, init_weights in _with_owner(model, model._init_weights):
                init_weights(module)
    except Exception as error:  # whatever a model's own code raises on values that make no sense
        raise UnsupportedModelError(f"no model can be built from config.json: {first_line(error)}") from None


def _with_owner(
    module: nn.Module, owner: Callable[[nn.Module], None]
) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """Yield every module with the initialiser of the innermost transformers model that holds it."""
    if isinstance(module, PreTrainedModel):
        owner = module._init_weights
    yield module, owner
    for child in module.children():
        yield from _with_owner(child, owner)
