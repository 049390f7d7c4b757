"""A model of which only the configuration is known: its weights are zeros, which take no memory until they are written.

That is enough to run the model's own forward, and so to see which sites share an input, what a forward needs and how
long it takes, for any architecture and size, without a checkpoint.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmprune.model.blocks import find_stages
from llmprune.model.configuration import read_config
from llmprune.model.sites import Site, Stage
from llmprune.model.skeleton import empty_model
from llmprune.model.ties import Ties


class Outline:
    """The same interface as `Streamed`, without weights.

    Args:
        folder: holds the config.json, and the code of models that come with their own.
        fields: what is in the config.json.
        device: where stages are made.
        dtype: None for the one that the configuration names.
    """

    def __init__(
        self,
        folder: Path,
        fields: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.device = device
        self.config = read_config(folder, fields, trust_remote_code)
        self.dtype = dtype or configured_dtype(self.config)
        self.model = empty_model(self.config, self.dtype, trust_remote_code)
        _, self.blocks, self.embedding, self.head = find_stages(self.model)
        self._tied = self.model.all_tied_weights_keys

    def open(self, home: torch.device) -> None:
        """Make what belongs to no stage."""
        for name in self._outer_names():
            self._fill(name, home)
        inside = {id(module) for stage in [*self.blocks, self.head] for module in stage.module.modules()}
        _fill_buffers((module for module in self.model.modules() if id(module) not in inside), home)

    def load(self, stage: Stage) -> None:
        """Make a stage's weights: matrices of zeros, and vectors of ones, so that norms let pass what they are fed."""
        for name, parameter in stage.module.named_parameters(stage.name):
            if parameter.is_meta:
                self._fill(name, self.device)
        _fill_buffers(stage.module.modules(), self.device)

    def keeping(self) -> AbstractContextManager[None]:
        """Nothing to do: weights are made in no time."""
        return nullcontext()

    def free(self, stage: Stage) -> None:
        """Drop a stage's weights."""
        outer = set(self._outer_names())
        for name, parameter in list(stage.module.named_parameters(stage.name)):
            if name not in outer:
                self._set(name, torch.empty_like(parameter, device="meta"))

    def device_of(self, stage: Stage) -> torch.device:
        """Return where a stage's weights are."""
        return next(stage.module.parameters()).device

    def weight(self, site: Site) -> Tensor:
        """Return the site's matrix [outputs, inputs], a view."""
        return site.view(site.module.get_parameter(site.parameter).data)

    def bytes_of(self, stage: Stage) -> int:
        """Return the bytes of the weights that loading a stage brings into memory."""
        outer = set(self._outer_names())
        return sum(p.nbytes for name, p in stage.module.named_parameters(stage.name) if name not in outer)

    def outer_bytes(self) -> int:
        """Return the bytes of what stays in memory while blocks come and go."""
        return sum(self.model.get_parameter(name).nbytes for name in self._outer_names())

    def _outer_names(self) -> list[str]:
        """Return the parameters that belong to no stage, and those that a stage shares with another part."""
        stored = [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in self._tied]
        ties = Ties(self._tied, stored)
        return [name for name in stored if ties.is_lent(name) or self._stage_of(name) is None]

    def _stage_of(self, name: str) -> str | None:
        stages = (stage.name for stage in [*self.blocks, self.head])
        return next((stage for stage in stages if name.startswith(f"{stage}.")), None)

    def _fill(self, name: str, device: torch.device) -> None:
        empty = self.model.get_parameter(name)
        filled = torch.ones_like(empty, device=device) if empty.ndim < 2 else zeros(empty.shape, empty.dtype, device)
        self._set(name, filled)

    def _set(self, name: str, value: Tensor) -> None:
        parameter = nn.Parameter(value, requires_grad=False)
        for path, _, own in (each.rpartition(".") for each in Ties(self._tied, ()).names(name)):
            self.model.get_submodule(path)._parameters[own] = parameter


def _fill_buffers(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                stored = buffer.is_meta  # the checkpoint would tell its contents; what is computed is there
                module._buffers[name] = torch.zeros_like(buffer, device=device) if stored else buffer.to(device)


def zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on the CPU they take no memory until they are written, which `torch.zeros` does at once."""
    shape = torch.Size(shape)
    if device.type != "cpu" or not shape.numel():
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape.numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def configured_dtype(config: Any) -> torch.dtype:
    """Return the dtype that a configuration names for its weights; float32 where it names none."""
    named = [getattr(part, "dtype", None) for part in (config, config.get_text_config())]
    return next((dtype for dtype in named if isinstance(dtype, torch.dtype)), torch.float32)
