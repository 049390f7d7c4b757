"""A model on disk of which one block at a time is in memory."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmprune.checkpoint import Source
from llmprune.errors import CheckpointError
from llmprune.model.blocks import find_blocks, find_ends
from llmprune.model.lanes import Lanes
from llmprune.model.memory import give_back_freed_memory
from llmprune.model.sites import Site, Stage, require_finite
from llmprune.model.skeleton import Loader, empty_model, quiet, read_config

_OUTER = ""  # what belongs to no stage: embeddings, final norm


class Streamed:
    """Loads and frees the blocks and the head of a checkpoint's model; the rest of it stays in memory.

    Args:
        source: the checkpoint.
        device: where stages are loaded.
        dtype: None for the dtype that the checkpoint's matrices are stored in.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.source, self.place = source, device
        self.config = read_config(source, trust_remote_code)
        self.dtype = dtype or stored_dtype(source)
        self.model = empty_model(self.config, self.dtype, trust_remote_code)
        self.blocks_name, blocks = find_blocks(self.model)
        self.blocks = [Stage(f"{self.blocks_name}.{index}", block) for index, block in enumerate(blocks)]
        self.embedding, self.head = find_ends(self.model)
        self._loader = Loader(source, self.model, self.dtype)
        self._names = self._names_by_stage()

    def open(self, home: torch.device) -> None:
        """Load what belongs to no stage, for the model's glue to run on `home`.

        Raises:
            CheckpointError: one of these tensors is missing or does not fit.
            NumericalError: one is not finite.
        """
        # Chunk by chunk from the file, not in the loaded tensor: the mapped pages of an embedding that calibration
        # never looks up then need no memory.
        for key in [*self._names[_OUTER], *self._names[self.head.name]]:
            for chunk in self.source.chunks(key):
                require_finite(key, chunk)
        self._loader.load(self._names[_OUTER], home)
        with quiet():
            self.model.tie_weights()
        stage_modules = {id(module) for stage in [*self.blocks, self.head] for module in stage.module.modules()}
        for path, module in self.model.named_modules():
            if id(module) not in stage_modules:
                _move_buffers(module, home)
                for name, parameter in module.named_parameters(path, recurse=False):
                    self._require_loaded(name, parameter)
        give_back_freed_memory()

    def load(self, stage: Stage) -> None:
        """Read a stage's tensors from disk.

        Raises:
            CheckpointError: one is missing or does not fit.
            NumericalError: one is not finite.
        """
        self._loader.load(self._names[stage.name], self.place)
        for module in stage.module.modules():
            _move_buffers(module, self.place)
        for name, parameter in stage.module.named_parameters(stage.name):
            self._require_loaded(name, parameter)
            require_finite(name, parameter)

    def free(self, stage: Stage) -> None:
        """Drop from memory the weights that `load` reads again: not the embedding, nor a head that is tied to it."""
        if not self._names[stage.name]:
            return
        tied = self.model.all_tied_weights_keys.keys() - self._loader.parameter_of.values()
        for path, module in stage.module.named_modules(prefix=stage.name):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and f"{path}.{name}" not in tied:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        give_back_freed_memory()

    def device_of(self, stage: Stage) -> torch.device:
        """Return where a loaded stage's weights are; a head tied to the embedding stays with it."""
        return next(stage.module.parameters()).device

    def notes(self) -> list[str]:
        """Return what a user should know of this checkpoint before it is pruned, in lines for the report."""
        notes, stored = [], stored_dtype(self.source)
        if torch.promote_types(stored, self.dtype) != self.dtype:
            notes.append(f"surviving weights were rounded from {stored} to {self.dtype}: leave --dtype at auto")
        unused = [key for key in self.source.entries if key not in self._loader.parameter_of]
        if unused:
            notes.append(f"{len(unused)} stored tensors are no part of the model and were copied, such as {unused[0]}")
        return notes

    def weight(self, site: Site) -> Tensor:
        """Return the site's matrix [outputs, inputs], a view: writing to it changes what `stored` returns."""
        return site.view(site.module.get_parameter(site.parameter).data)

    def parameter_of(self, key: str) -> str:
        """Return the parameter that a tensor of the source goes to; its own name where the model has no use for it."""
        return self._loader.parameter_of.get(key, key)

    def tied_to(self, parameter: str) -> str:
        """Return the parameter under whose name a tied parameter is stored; its own name where it is not tied."""
        stored = set(self._loader.parameter_of.values())
        return parameter if parameter in stored else self.model.all_tied_weights_keys.get(parameter, parameter)

    def stored(self, stage: Stage, sites: Sequence[Site]) -> Iterator[tuple[str, Tensor]]:
        """Yield the source's tensors, with their names and dtypes there, that hold these sites of a loaded stage."""
        state = {f"{stage.name}.{name}": value for name, value in stage.module.state_dict().items()}
        tied = self.model.all_tied_weights_keys
        state |= {tied[name]: state[name] for name in list(state) if name in tied}
        wanted = {site.tensor for site in sites} | {tied[site.tensor] for site in sites if site.tensor in tied}
        for key, tensor in self._loader.stored(state).items():
            if self._loader.parameter_of.get(key) in wanted:
                yield key, _cast(tensor, self.source.entries[key].torch_dtype)

    def _require_loaded(self, name: str, parameter: Tensor) -> None:
        if parameter.is_meta:
            raise CheckpointError(f"{self.source.folder} lacks the tensor {name} that its config asks for")

    def _names_by_stage(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        for key, parameter in self._loader.parameter_of.items():
            names[self._stage_name(parameter)].append(key)
        return names

    def _stage_name(self, parameter: str) -> str:
        if parameter.startswith(f"{self.blocks_name}."):
            index = parameter[len(self.blocks_name) + 1 :].partition(".")[0]
            return f"{self.blocks_name}.{index}"
        return self.head.name if parameter.startswith(f"{self.head.name}.") else _OUTER


def stored_dtype(source: Source) -> torch.dtype:
    """Return the floating dtype in which most of a checkpoint's weights are stored.

    Raises:
        CheckpointError: a tensor's dtype is one that only quantized checkpoints have.
    """
    sizes: Counter[torch.dtype] = Counter()
    for entry in source.entries.values():
        sizes[entry.torch_dtype] += entry.count
    dtype = sizes.most_common(1)[0][0] if sizes else torch.int8
    if not dtype.is_floating_point:
        raise CheckpointError(f"{source.folder} is quantized (most of it is {dtype}): prune the original checkpoint")
    return dtype


def streamed_logits(folder: str | Path, input_ids: Tensor, device: str = "cpu") -> Tensor:
    """Return the logits [sequences, length, vocabulary] of a checkpoint, with one block in memory at a time."""
    place = torch.device(device)
    host = Streamed(Source.open(folder), place)
    stages = [*host.blocks, host.head]
    host.open(place)
    with Lanes(host.model, stages, [input_ids], place, host.device_of) as lanes:
        for index, stage in enumerate(stages):
            host.load(stage)
            lanes.advance(index)
            host.free(stage)
        logits: Tensor = lanes.outputs()[0].logits
    return logits


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast without making a -0.0: that is what small negative numbers become in a narrower dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype).add_(0.0)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = buffer.to(device)
