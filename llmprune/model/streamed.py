"""A model on disk of which one block at a time is in memory."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint import Source
from llmprune.checkpoint.unpacked import open_dense
from llmprune.errors import CheckpointError, one_line
from llmprune.model.blocks import find_stages
from llmprune.model.configuration import read_config, require_not_quantized, unknown_fields
from llmprune.model.lanes import Lanes
from llmprune.model.memory import give_back_freed_memory, give_back_growth, room_for_blocks
from llmprune.model.sites import Site, Stage, out_of_range, require_finite
from llmprune.model.skeleton import Loader, empty_model, fill_buffers

_OUTER = ""  # what belongs to no stage: embeddings, final norm

Held = list[tuple[nn.Module, str, nn.Parameter]]  # by its module and the name there


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
        self.source, self.device = source, device
        self.config = read_config(source.folder, source.config, trust_remote_code)
        _require_as_many_tensors(source, self.config)
        self.dtype = dtype or stored_dtype(source)
        self.model = empty_model(self.config, self.dtype, trust_remote_code)
        self.blocks_name, self.blocks, self.embedding, self.head = find_stages(self.model)
        self._loader = Loader(source, self.model, self.dtype)
        fill_buffers(self.model)  # now that the files have confirmed the shapes that the configuration asks for
        self._names = self._names_by_stage()
        self._kept: dict[str, Held] = {}  # what was freed and is still there
        self._most_kept = 0  # bytes
        self._usual_bytes: int | None = None  # in memory after a stage is freed

    def open(self, home: torch.device) -> None:
        """Load what belongs to no stage, for the model's glue to run on `home`; whatever was loaded before is dropped.

        Raises:
            CheckpointError: one of these tensors is missing or does not fit.
            NumericalError: one is not finite.
        """
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta:
                    _empty(module, name, parameter)
        # Chunk by chunk from the file, not in the loaded tensor: the mapped pages of an embedding that calibration
        # never looks up then need no memory.
        for key in [*self._names[_OUTER], *self._names[self.head.name]]:
            for chunk in self.source.chunks(key):
                require_finite(key, chunk)
        self._loader.load(self._names[_OUTER], home, mapped=True)
        self._loader.ties.link(self.model, _names_in(self.model))
        stage_modules = {id(module) for stage in [*self.blocks, self.head] for module in stage.module.modules()}
        for path, module in self.model.named_modules():
            if id(module) not in stage_modules:
                _move_buffers(module, home)
                for name, parameter in module.named_parameters(path, recurse=False):
                    self._require_loaded(name, parameter)
        give_back_freed_memory()

    def load(self, stage: Stage, source: Source | None = None) -> None:
        """Read a stage's tensors from disk: from the checkpoint, or from another `source` that has the same names.

        Raises:
            CheckpointError: one is missing or does not fit.
            NumericalError: one is not finite.
        """
        kept = self._kept.pop(stage.name, None)
        if kept and source is None:
            for module, name, parameter in kept:
                module._parameters[name] = parameter
            return
        self._loader.load(self._names[stage.name], self.device, source)
        self._loader.ties.link(self.model, _names_in(stage.module, stage.name))
        for module in stage.module.modules():
            _move_buffers(module, self.device)
        for name, parameter in stage.module.named_parameters(stage.name):
            self._require_loaded(name, parameter)
            require_finite(name, parameter)

    def free(self, stage: Stage) -> None:
        """Drop from memory the weights that `load` reads again: not the embedding, nor what other stages share."""
        if self._names[stage.name]:
            self._let_go(stage)
            self._usual_bytes = give_back_growth(self._usual_bytes)

    def _let_go(self, stage: Stage) -> None:
        """Free a stage's own parameters, or keep them for `load` within `keeping`, and put empty ones in their place."""
        held = [
            (module, name, parameter)
            for path, module in stage.module.named_modules(prefix=stage.name)
            for name, parameter in module._parameters.items()
            if parameter is not None and not self._loader.ties.is_lent(f"{path}.{name}")
        ]
        whole = not any(parameter.is_meta for _, _, parameter in held)  # unlike after a failure
        if whole and sum(map(_bytes, [held, *self._kept.values()])) <= self._most_kept:
            self._kept[stage.name] = held
        for module, name, parameter in held:
            _empty(module, name, parameter)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Let stages that are freed within the block, unchanged, stay on a GPU where it has room, for `load` to find."""
        self._most_kept = room_for_blocks(self.device)
        try:
            yield
        finally:
            self._most_kept = 0

    def outlives(self, site: Site) -> bool:
        """Say whether a site stays in memory when its stage is freed, as a head does that is tied to the embedding."""
        return self._loader.ties.is_lent(site.tensor)

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
        if ignored := unknown_fields(self.source.config, self.config):
            notes.append(f"config.json has fields that transformers does not know and ignores: {', '.join(ignored)}")
        return [one_line(note) for note in notes]

    def weight(self, site: Site) -> Tensor:
        """Return the site's matrix [outputs, inputs], a view: writing to it changes what `stored` returns."""
        return site.view(site.module.get_parameter(site.parameter).data)

    def parameter_of(self, key: str) -> str:
        """Return the parameter that a tensor of the source goes to; its own name where the model has no use for it."""
        return self._loader.parameter_of.get(key, key)

    def tied_to(self, parameter: str) -> str:
        """Return the parameter under whose name a tied parameter is stored; its own name where it is not tied."""
        return self._loader.ties.stored_name(parameter)

    def stored(self, stage: Stage, parameters: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the source's tensors, names and dtypes as there, that hold these parameters of a loaded stage."""
        state = {f"{stage.name}.{name}": value for name, value in stage.module.state_dict().items()}
        ties = self._loader.ties
        state |= {namesake: state[name] for name in list(state) for namesake in ties.names(name)}
        wanted = {namesake for name in parameters for namesake in ties.names(name)}
        for key, tensor in self._loader.stored(state).items():
            if self._loader.parameter_of.get(key) in wanted:
                yield key, _cast(key, tensor, self.source.entries[key].torch_dtype)

    def rounds(self, stage: Stage) -> bool:
        """Say whether a loaded stage's weights lose precision in the dtypes in which they are stored."""
        state = stage.module.state_dict(prefix=f"{stage.name}.")
        return any(
            torch.promote_types(stored, state[name].dtype) != stored
            for key, name in self._loader.parameter_of.items()
            if name in state and (stored := self.source.entries[key].torch_dtype).is_floating_point
        )

    def _require_loaded(self, name: str, parameter: Tensor) -> None:
        if parameter.is_meta:
            raise CheckpointError(f"{self.source.folder} lacks the tensor {name} that its config asks for")

    def _names_by_stage(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        for key, parameter in self._loader.parameter_of.items():
            namesakes = self._loader.ties.names(parameter) if self._loader.ties.is_lent(parameter) else ()
            stages = [self._stage_name(name) for name in (parameter, *namesakes)]
            names[_OUTER if _OUTER in stages else stages[0]].append(key)
        return names

    def _stage_name(self, parameter: str) -> str:
        if parameter.startswith(f"{self.blocks_name}."):
            index = parameter[len(self.blocks_name) + 1 :].partition(".")[0]
            return f"{self.blocks_name}.{index}"
        return self.head.name if parameter.startswith(f"{self.head.name}.") else _OUTER


def stored_dtype(source: Source) -> torch.dtype:
    """Return the floating dtype in which most of a checkpoint's weights are stored.

    Raises:
        CheckpointError: the checkpoint is quantized or compressed, as its configuration or a tensor's dtype shows.
    """
    require_not_quantized(source.folder, source.config)
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
    host = Streamed(open_dense(folder), place)
    stages = [*host.blocks, host.head]
    host.open(place)
    with Lanes(host.model, stages, [input_ids], place, host.device_of) as lanes:
        for index, stage in enumerate(stages):
            host.load(stage)
            lanes.advance(index)
            host.free(stage)
        logits: Tensor = lanes.outputs()[0].logits
    return logits


def _require_as_many_tensors(source: Source, config: Any) -> None:
    """A model of a billion blocks would never be built, and has a billion tensors."""
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > len(source.entries):
        raise CheckpointError(f"{source.folder} has {len(source.entries)} tensors, too few for {blocks} blocks")


def _names_in(module: nn.Module, prefix: str = "") -> list[str]:
    return [name for name, _ in module.named_parameters(prefix, remove_duplicate=False)]


def _bytes(held: Held) -> int:
    return sum(parameter.nbytes for _, _, parameter in held)


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast without making a -0.0, which small negative numbers become in a narrower dtype, or an infinity."""
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype).add_(0.0)
    require_finite(f"the solution of {key}", cast, out_of_range(dtype))
    return cast


def _empty(module: nn.Module, name: str, parameter: Tensor) -> None:
    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = buffer.to(device)
