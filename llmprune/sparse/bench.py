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

from llmprune.checkpoint import Source
from llmprune.errors import RecipeError
from llmprune.locate import locate
from llmprune.progress import Progress
from llmprune.report import hardware, versions
from llmprune.sparse.linear import SparseLinear
from llmprune.sparse.running import load
from llmprune.sparse.sparsify import Sparsified, sparsify

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
    """Both sides of a run, and which kernel runs for each shape of layer."""

    model: str
    setting: dict[str, int]
    dense: Side
    sparse: Side
    bandwidth: float  # bytes a second
    sparsified: Sparsified

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain values."""
        return {
            "model": self.model,
            **self.setting,
            "dense": _plain(self.dense),
            "sparse": _plain(self.sparse),
            "decode_speedup": self.sparse.decode.median / self.dense.decode.median,
            "prefill_speedup": self.sparse.prefill.median / self.dense.prefill.median,
            "bandwidth_bytes_per_s": self.bandwidth,
            **self.sparsified.to_json(),
            "hardware": hardware(),
            "versions": versions(),
        }

    def __str__(self) -> str:
        dense, sparse = self.dense, self.sparse
        rows = [
            ("prefill tokens/s", str(dense.prefill), str(sparse.prefill), sparse.prefill.median / dense.prefill.median),
            ("decode tokens/s", str(dense.decode), str(sparse.decode), sparse.decode.median / dense.decode.median),
            ("  of the roofline", *(f"{side.decode.median / side.roofline:.0%}" for side in (dense, sparse)), None),
            ("all weights", *(f"{side.weight_bytes / 1e6:.1f} MB" for side in (dense, sparse)),
             sparse.weight_bytes / dense.weight_bytes),
            ("linear layers", *(f"{side.linear_bytes / 1e6:.1f} MB" for side in (dense, sparse)),
             sparse.linear_bytes / dense.linear_bytes),
        ]  # fmt: skip
        lines = [f"{'median [p20, p80]':18}{'dense':>28}{'sparse':>28}   ratio"]
        for name, left, right, ratio in rows:
            lines.append(f"{name:18}{left:>28}{right:>28}" + (f"{ratio:8.2f}" if ratio else ""))
        return "\n".join([*lines, f"memory bandwidth  {self.bandwidth / 1e9:.1f} GB/s", str(self.sparsified)])


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Benchmark:
    """Measure a model on the CPU, dense and sparse in turn, on random tokens.

    Args:
        model: a folder, dense or compressed, a Hub id, or `demo`.
        rounds: times that each side reads the prompt and writes the tokens.

    Raises:
        LlmpruneError: the model cannot be loaded, or a number is below 1.
    """
    setting = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "rounds": rounds}
    for name, value in setting.items():
        if value < 1:
            raise RecipeError(f"{name} is {value}: it must be at least 1")
    loaded = load(Source.open(locate(model, revision)), trust_remote_code, dtype)
    return measure(loaded, str(model), setting)


def measure(dense: Any, name: str, setting: dict[str, int]) -> Benchmark:
    """Compare a dense model on the CPU with its sparse twin; `setting` holds the numbers that `bench` takes."""
    sparse = twin(dense)
    sparsified = sparsify(sparse, batch=setting["batch"])
    prompt_BT = _prompt(dense, setting["batch"], setting["prompt_tokens"])
    rates = {"dense": _Rates(dense), "sparse": _Rates(sparse)}
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
    return Benchmark(name, setting, sides["dense"], sides["sparse"], bandwidth, sparsified)


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
    sparse = sum(layer.nbytes() for layer in model.modules() if isinstance(layer, SparseLinear))
    return sparse + sum(parameter.nbytes for parameter in model.parameters())


def linear_bytes(model: nn.Module) -> int:
    """Return the bytes that a step reads of the linear layers' weights."""
    dense = {id(layer.weight): layer.weight.nbytes for layer in model.modules() if type(layer) is nn.Linear}
    return sum(dense.values()) + sum(layer.nbytes() for layer in model.modules() if isinstance(layer, SparseLinear))


def _prompt(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator).to(model.device)


def _plain(side: Side) -> dict[str, Any]:
    return {**vars(side), "prefill": vars(side.prefill), "decode": vars(side.decode)}
