"""A model to be measured: loaded by the caller, or a checkpoint whose logits are computed in memory or streamed.

Streamed logits equal those in memory bit for bit, as they are those of the model's own forward on the same batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from llmprune.checkpoint import Source
from llmprune.checkpoint.unpacked import open_dense
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.model import Lanes, Streamed, load_causal_lm, load_tokenizer, read_config
from llmprune.model.memory import home_device
from llmprune.model.streamed import stored_dtype
from llmprune.options import DTYPES, require_dtype, resolve_device
from llmprune.progress import Progress
from llmprune.sparse.sparsify import count_sparse, sparsify

_MEMORY_SHARE = 0.8  # of the free memory that weights may take; the rest is for activations and logits


@dataclass(frozen=True)
class Place:
    """Where and how checkpoints are run; `streamed` None streams what does not fit into the free memory.

    `sparse` keeps layers sparse, as `llmprune.sparsify` does; the model is then in memory as a whole.
    """

    device: torch.device
    dtype: torch.dtype | None
    streamed: bool | None
    trust_remote_code: bool
    sparse: bool = False

    @classmethod
    def of(
        cls, device: str, dtype: str, streamed: bool | None, trust_remote_code: bool, sparse: bool = False
    ) -> "Place":
        """Return the place that these options name.

        Raises:
            RecipeError: there is no such device or dtype, or a streamed model is to be sparse.
        """
        require_dtype(dtype)
        if sparse and streamed:
            raise RecipeError("sparse layers are for models in memory: leave out --streamed or --sparse")
        return cls(resolve_device(device), DTYPES.get(dtype), False if sparse else streamed, trust_remote_code, sparse)


class Subject:
    """A model to be measured.

    Args:
        model: a folder, a Hub id, `demo`, or a loaded `PreTrainedModel` (then `place` does not matter).
        tokenizer: for a loaded model.

    Raises:
        CheckpointError: there is no such checkpoint.
        RecipeError: a loaded model is to be streamed.
    """

    def __init__(self, model: Any, place: Place, tokenizer: Any = None, revision: str | None = None) -> None:
        self.model, self._place, self._tokenizer = model, place, tokenizer
        self.source = open_dense(locate(model, revision)) if isinstance(model, str | Path) else None
        if self.source is None and place.streamed:
            raise RecipeError("a loaded model is in memory already: give its folder to stream it")
        if self.source is None and place.sparse:
            raise RecipeError("a loaded model is measured as it is: call llmprune.sparsify(model) first")
        if self.source:
            self.config = read_config(self.source.folder, self.source.config, place.trust_remote_code)
        else:
            self.config = model.config

    @property
    def name(self) -> str:
        """What the caller calls the model."""
        return str(self.model) if self.source else self.model.name_or_path or type(self.model).__name__

    @property
    def folder(self) -> Path:
        """Where the checkpoint lies.

        Raises:
            RecipeError: the model was given loaded.
        """
        if self.source is None:
            raise RecipeError("the figures of a loaded model have no llmprune.json to go to: give its folder")
        return self.source.folder

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            CheckpointError: the folder has none that loads.
        """
        if self.source is None:
            return self._tokenizer
        return load_tokenizer(self.source.folder, self._place.trust_remote_code)

    @cached_property
    def streamed(self) -> bool:
        """Whether one block at a time is in memory."""
        if self.source is None:
            return False
        return self._place.streamed if self._place.streamed is not None else _too_large(self.source, self._place)

    @cached_property
    def network(self) -> Any:
        """The whole model in memory."""
        if self.source is None:
            return self.model
        network = load_causal_lm(self.source, self._place.device, self._place.dtype, self._place.trust_remote_code)
        if self._place.sparse:
            sparsify(network)
        return network

    @property
    def sparse_layers(self) -> int:
        """How many layers of it are sparse."""
        return 0 if self.streamed else count_sparse(self.network)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.host.dtype if self.streamed else self.network.dtype

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self._place.device if self.streamed else self.network.device

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        model: Any = self.host.model if self.streamed else self.network
        return int(model.get_input_embeddings().weight.shape[0])

    @cached_property
    def host(self) -> Streamed:
        """The model on disk, one block at a time in memory."""
        assert self.source is not None
        return Streamed(self.source, self._place.device, self._place.dtype, self._place.trust_remote_code)

    def logits(self, batches_BL: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the logits [windows, length, vocabulary] of every batch; those of one batch are in memory at a time."""
        return _streamed(self.host, batches_BL) if self.streamed else _in_memory(self.network, batches_BL)


def _in_memory(network: Any, batches_BL: Sequence[Tensor]) -> Iterator[Tensor]:
    with torch.no_grad(), _evaluating(network), Progress(len(batches_BL), "evaluating", "batch") as bar:
        for batch_BL in batches_BL:
            yield network(input_ids=batch_BL.to(network.device), use_cache=False).logits
            bar.step()


def _streamed(host: Streamed, batches_BL: Sequence[Tensor]) -> Iterator[Tensor]:
    rows = [row for batch in batches_BL for row in batch]
    home = home_device(host.device, rows, host.config, host.dtype)
    host.open(home)
    stages = [*host.blocks, host.head]
    lanes = _OneByOne(host.model, stages, batches_BL, home, host.device_of)
    with lanes:
        with Progress(len(stages), "evaluating", "block") as bar:
            for index, stage in enumerate(host.blocks):
                host.load(stage)
                lanes.advance(index)
                host.free(stage)
                bar.step()
        host.load(host.head)
        try:
            for output in lanes.finish(len(host.blocks)):
                yield output.logits
        finally:  # also where the caller stops before the end
            host.free(host.head)


class _OneByOne(Lanes):
    """Lanes whose last stage is run for one of them after another, as the logits of all would fill the memory."""

    def finish(self, index: int) -> Iterator[Any]:
        """Run the last stage lane by lane, and yield what each forward returns."""
        for lane in range(len(self)):
            output = self._send_home(self.run(index, lane))
            self._arrivals[lane] = self._resume(lane, output)
            yield self._results.pop()


@contextmanager
def _evaluating(network: Any) -> Iterator[None]:
    """Switch dropout off, and back on where it was."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def _too_large(source: Source, place: Place) -> bool:
    dtype = place.dtype or stored_dtype(source)
    needed = sum(entry.count for entry in source.entries.values()) * dtype.itemsize
    free = psutil.virtual_memory().available
    if place.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place.device)
    return needed > _MEMORY_SHARE * free
