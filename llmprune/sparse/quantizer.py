"""Compressed checkpoints as transformers sees them: a quantization method called `llmprune`.

    AutoModelForCausalLM.from_pretrained(SMALL)                                                 dense, bit for bit
    AutoModelForCausalLM.from_pretrained(SMALL, quantization_config=SparseConfig("sparse"))     kept sparse

A packed tensor has the name of the dense one, so transformers renames and merges it as ever; only an operation that
unpacks goes first.
"""

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.checkpoint.format import FORMAT, FORMAT_VERSION, METHOD, require_version
from llmprune.checkpoint.packed import dense_tensor, is_packed, typed_matrix
from llmprune.errors import RecipeError, did_you_mean
from llmprune.sparse.forms import Form, Packed, sparse_forms
from llmprune.sparse.sparsify import hold_sparse, sparsify

RUNTIMES = ("dense", "sparse")


class SparseConfig(QuantizationConfigMixin):
    """How a compressed checkpoint is loaded: `runtime` dense, or sparse as `llmprune.sparsify` would make it.

    Raises:
        RecipeError: the runtime is unknown.
        CheckpointError: the checkpoint's format is that of a newer llmprune.
    """

    def __init__(
        self, runtime: str = "dense", format: str = FORMAT, version: int = FORMAT_VERSION, **unused: Any
    ) -> None:
        if runtime not in RUNTIMES:
            raise RecipeError(f"unknown runtime '{runtime}': {did_you_mean(runtime, RUNTIMES)}")
        require_version({"format": format, "version": version}, "the checkpoint")
        self.quant_method: Any = METHOD
        self.runtime, self.format, self.version = runtime, format, version
        self.dequantize = True  # what is saved from the loaded model is dense again

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what the user decides, not the checkpoint."""
        return {"runtime": self.runtime}


class Unpack(ConversionOps):
    """Makes packed tensors dense, or their layers sparse, and casts them as transformers casts what it reads."""

    def __init__(self, quantizer: "SparseQuantizer") -> None:
        self._quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpack":
        return self  # transformers copies the operations for each tensor

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **unused: Any,
    ) -> dict[str, Any]:
        dtype = self._quantizer.dtype_of(model, full_layer_name)
        lists = {pattern: found if isinstance(found, list) else [found] for pattern, found in input_dict.items()}
        if list(lists) != [EVERY]:
            return {pattern: [_dense(t, full_layer_name, dtype) for t in found] for pattern, found in lists.items()}
        (stored,) = lists[EVERY]
        if self._quantizer.keep_sparse and _held_sparse(model, full_layer_name, stored, dtype):
            missing_keys.discard(full_layer_name)
            return {}
        return {full_layer_name: _dense(stored, full_layer_name, dtype)}


EVERY = "^"  # matches the empty beginning of every name, and leaves the name as it is


class SparseQuantizer(HfQuantizer):
    """Loads compressed checkpoints; see `SparseConfig`."""

    requires_calibration = False

    @property
    def keep_sparse(self) -> bool:
        """Say whether linear layers stay sparse."""
        config: Any = self.quantization_config
        return bool(config.runtime == "sparse")

    def dtype_of(self, model: PreTrainedModel, name: str) -> torch.dtype:
        """Return the dtype that transformers gives a tensor of the model."""
        plan = model._get_dtype_plan(model.dtype)
        planned = (dtype for glob, dtype in plan.items() if re.search(glob.replace("*", ".*"), name))
        path, _, attribute = name.rpartition(".")
        held: Tensor = getattr(model.get_submodule(path), attribute)
        return next(planned, held.dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Let each conversion unpack first, and tensors without a conversion be unpacked."""
        unpack = Unpack(self)
        updated = [copy.copy(conversion) for conversion in weight_conversions]
        for conversion in updated:
            if isinstance(conversion, WeightConverter):
                conversion.operations = [unpack, *conversion.operations]
        return [*updated, WeightConverter(EVERY, "", [unpack])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Cast while reading what is not packed; packed bytes must stay as they are."""
        return dtype if param.get_dtype().startswith(("F", "BF")) else None

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> Any:
        model._weight_conversions = [kept for kept in map(_without_unpacking, model._weight_conversions) if kept]
        if self.keep_sparse:
            sparsify(model)
        return model

    def is_serializable(self) -> bool:
        """Say that the model can be saved: as the dense one that it stands for."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say whether the weights can be trained."""
        return not self.keep_sparse


def _held_sparse(model: Any, name: str, stored: Tensor, dtype: torch.dtype) -> bool:
    """Let the layer of a packed tensor be sparse, if it can be; say whether it is.

    On the CPU the layer reads the bytes where they lie: in the file, which is mapped into memory.
    """
    if not is_packed(stored):
        return False
    layout, matrix = typed_matrix(stored.cpu(), name)
    if len(layout.shape) != 2 or not matrix.values.is_floating_point():
        return False
    form: Form = Packed.holding(replace(matrix, values=matrix.values.to(dtype)))
    if stored.device.type != "cpu":
        weight_OI = form.expand().to(stored.device)
        suitable = sparse_forms(weight_OI)
        if not suitable:
            return False
        form = suitable[0].of(weight_OI)
    return hold_sparse(model, name, form)


def _dense(tensor: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if is_packed(tensor):
        tensor = dense_tensor(tensor.cpu(), name).to(tensor.device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _without_unpacking(conversion: Any) -> Any:
    """Return a conversion as the dense checkpoint has it, None for the one that only unpacks."""
    if isinstance(conversion, WeightConverter):
        conversion.operations = [each for each in conversion.operations if not isinstance(each, Unpack)]
        return conversion if conversion.operations else None
    return conversion


auto.register_quantization_config(METHOD)(SparseConfig)
auto.register_quantizer(METHOD)(SparseQuantizer)
# Transformers takes `runtime` from the user's SparseConfig, the rest from the checkpoint's, for the classes listed here.
setattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, SparseConfig))  # noqa: B010
