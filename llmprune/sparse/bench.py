"""Dense against sparse in one run: how fast a model reads a prompt and writes tokens, and how much memory it takes."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmprune.checkpoint.unpacked import open_dense
from llmprune.environment import hardware, versions
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.model.configuration import read_config
from llmprune.model.experts import stacks_of
from llmprune.options import resolve_device
from llmprune.planning import context_length
from llmprune.progress import Progress
from llmprune.sparse.linear import SparseLinear
from llmprune.sparse.plot import Bar, picture
from llmprune.sparse.running import load
from llmprune.sparse.sparsify import Sparsified, sparsify
from llmprune.sparse.stacks import SparseExperts

_PROMPT = 512  # tokens, where nobody says
_STREAMED_BYTES = 512 << 20  # read to find the bandwidth: more than a processor's cache holds


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the rounds of a run, all sequences of the batch together."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> "Speed":
        """Return the speed of `tokens` tokens in each of `seconds`."""
        p20, median, p80 = np.percentile(tokens / np.array(seconds), (20, 50, 80))
        return cls(float(median), float(p20), float(p80))

    def __str__(self) -> str:
        return f"{self.median:.1f} [{self.p20:.1f}, {self.p80:.1f}]"


@dataclass(frozen=True)
class Side:
    """One of the two models: its speeds, and the bytes of all its weights and of its linear layers'."""

    prefill: Speed
    decode: Speed
    weight_bytes: int
    linear_bytes: int
    roofline: float  # tokens a second, were reading the linear layers' weights all that decoding costs


@dataclass(frozen=True)
class Benchmark:
    """Both sides of a run, and which kernel runs for each shape of layer; `sparse` is None where no layer is."""

    model: str
    setting: dict[str, int]
    dense: Side
    sparse: Side | None
    bandwidth: float  # bytes a second
    sparsified: Sparsified
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain values."""
        dense, sparse = self.dense, self.sparse
        return {
            "model": self.model,
            **self.setting,
            "device": self.device,
            "dense": _plain(dense),
            "sparse": _plain(sparse) if sparse else None,
            "decode_speedup": sparse.decode.median / dense.decode.median if sparse else None,
            "prefill_speedup": sparse.prefill.median / dense.prefill.median if sparse else None,
            "bandwidth_bytes_per_s": self.bandwidth,
            **self.sparsified.to_json(),
            "hardware": hardware(),
            "versions": versions(),
        }

    def __str__(self) -> str:
        sides = [self.dense, self.sparse] if self.sparse else [self.dense]
        rows: dict[str, list[tuple[str, float | None]]] = {
            "prefill tokens/s": [(str(side.prefill), side.prefill.median) for side in sides],
            "decode tokens/s": [(str(side.decode), side.decode.median) for side in sides],
            "  of the roofline": [(f"{side.decode.median / side.roofline:.0%}", None) for side in sides],
            "all weights": [(f"{side.weight_bytes / 1e6:.1f} MB", side.weight_bytes) for side in sides],
            "linear layers": [(f"{side.linear_bytes / 1e6:.1f} MB", side.linear_bytes) for side in sides],
        }
        heads = ("dense", "sparse")[: len(sides)]
        lines = [f"{'median [p20, p80]':18}" + "".join(f"{head:>28}" for head in heads) + "   ratio" * (len(sides) - 1)]
        lines += [
            f"{name:18}" + "".join(f"{text:>28}" for text, _ in cells) + _ratio(cells) for name, cells in rows.items()
        ]
        lines += [f"memory bandwidth  {self.bandwidth / 1e9:.1f} GB/s", str(self.sparsified)]
        return "\n".join(lines if self.sparse else [*lines, "nothing is sparse here, so there is nothing to compare"])

    def plot(self) -> str:
        """Return a picture of the speeds as the text of an SVG file."""
        sides = {"dense": self.dense} | ({"sparse": self.sparse} if self.sparse else {})
        panels = [
            ("prefill, tokens/s", [Bar(name, **vars(side.prefill)) for name, side in sides.items()]),
            (
                "decode, tokens/s",
                [Bar(name, **vars(side.decode), roofline=side.roofline) for name, side in sides.items()],
            ),
        ]
        where = f"{hardware()['threads']} threads" if self.device == "cpu" else self.device
        title = f"{self.model}: {self.setting['prompt_tokens']} tokens read, {self.setting['new_tokens']} written"
        return picture(f"{title}, batch {self.setting['batch']}, {where}", panels)


def _ratio(cells: Sequence[tuple[str, float | None]]) -> str:
    """Return how many times the dense figure the sparse one is."""
    figures = [figure for _, figure in cells if figure is not None]
    return f"{figures[1] / figures[0]:8.2f}" if len(figures) == 2 else ""


def bench(
    model: str | Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Benchmark:
    """Measure a model, dense and sparse in turn, on random tokens.

    Args:
        model: a folder, dense or compressed, a Hub id, or `demo`.
        prompt_tokens: of each sequence; None is 512, or what the model's context leaves beside the new ones.
        batch: sequences at a time.
        rounds: times that each side reads the prompt and writes the tokens.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        LlmpruneError: the model cannot be loaded, a number is below 1, there is no such device, or, before any weights
            are loaded, the tokens exceed the model's context.
    """
    asked = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "rounds": rounds}
    for name, value in asked.items():
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}: it must be at least 1")
    place = resolve_device(device)
    source = open_dense(locate(model, revision))
    context = context_length(read_config(source.folder, source.config, trust_remote_code))
    fitting = _prompt_length(prompt_tokens, new_tokens, context)
    loaded = load(source, trust_remote_code, dtype).to(place)
    return measure(
        loaded, str(model), {"prompt_tokens": fitting, "new_tokens": new_tokens, "batch": batch, "rounds": rounds}
    )


def _prompt_length(asked: int | None, new_tokens: int, context: int | None) -> int:
    length = asked or min(_PROMPT, max(1, (context or _PROMPT + new_tokens) - new_tokens))
    if context is not None and length + new_tokens > context:
        raise RecipeError(
            f"{length} prompt tokens and {new_tokens} new ones are more than the model's context of {context}: ask for fewer"
        )
    return length


def measure(dense: Any, name: str, setting: dict[str, int]) -> Benchmark:
    """Compare a dense model, where it lies, with its sparse twin; `setting` holds the numbers that `bench` takes."""
    sparse = twin(dense)
    sparsified = sparsify(sparse, batch=setting["batch"])
    prompt_BT = _prompt(dense, setting["batch"], setting["prompt_tokens"])
    rates = {"dense": _Rates(dense)} | ({"sparse": _Rates(sparse)} if sparsified.sparse_layers else {})
    with torch.inference_mode(), Progress(setting["rounds"], "measuring", "round") as bar:
        for side in rates.values():
            side.run(prompt_BT, 2)
            side.forget()
        for _ in range(setting["rounds"]):
            for side in rates.values():
                side.run(prompt_BT, setting["new_tokens"])
            bar.step()
    bandwidth = read_bandwidth(prompt_BT.device)
    sides = {which: side.result(prompt_BT.numel(), setting["batch"], bandwidth) for which, side in rates.items()}
    return Benchmark(name, setting, sides["dense"], sides.get("sparse"), bandwidth, sparsified, str(prompt_BT.device))


def twin(model: nn.Module) -> Any:
    """Return a model of the same layers that shares all parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def read_bandwidth(device: torch.device | None = None) -> float:
    """Return the bytes a second at which torch reads memory, on the CPU with the threads it has."""
    streamed = torch.ones(_STREAMED_BYTES // 4, device=device)
    seconds = []
    for _ in range(5):
        began = now(streamed.device)
        streamed.sum()
        seconds.append(now(streamed.device) - began)
    return _STREAMED_BYTES / min(seconds)


def now(device: torch.device) -> float:
    """Return the time in seconds at which a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Rates:
    """Seconds of one model: of each prompt, and of each step after it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def run(self, prompt_BT: Tensor, new_tokens: int) -> None:
        """Read the prompt, then write tokens greedily."""
        began = now(prompt_BT.device)
        out = self._model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
        self.prefill.append(now(prompt_BT.device) - began)
        for _ in range(new_tokens):
            began = now(prompt_BT.device)
            ids_B1 = out.logits[:, -1:].argmax(-1)
            out = self._model(input_ids=ids_B1, past_key_values=out.past_key_values, use_cache=True)
            self.decode.append(now(prompt_BT.device) - began)

    def forget(self) -> None:
        """Drop what was measured so far: the first run pays for what later ones find ready."""
        self.prefill.clear()
        self.decode.clear()

    def result(self, prompt_tokens: int, batch: int, bandwidth: float) -> Side:
        """Return what was measured."""
        linear = linear_bytes(self._model)
        return Side(
            Speed.of(prompt_tokens, self.prefill),
            Speed.of(batch, self.decode),
            weight_bytes(self._model),
            linear,
            batch * bandwidth / linear,
        )


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights of a model."""
    return _sparse_bytes(model) + sum(parameter.nbytes for parameter in model.parameters())


def linear_bytes(model: nn.Module) -> int:
    """Return the bytes of the linear layers' weights and of fused experts, of which a step reads the chosen ones."""
    dense = {id(layer.weight): layer.weight.nbytes for layer in model.modules() if type(layer) is nn.Linear}
    stacks = [module.get_parameter(stack.parameter) for module in model.modules() for stack in stacks_of(module)]
    return _sparse_bytes(model) + sum(dense.values()) + sum(stored.nbytes for stored in stacks)


def _sparse_bytes(model: nn.Module) -> int:
    return sum(layer.nbytes() for layer in model.modules() if isinstance(layer, SparseLinear | SparseExperts))


def _prompt(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(model.device)


def _plain(side: Side) -> dict[str, Any]:
    return {**vars(side), "prefill": vars(side.prefill), "decode": vars(side.decode)}
