"""Which implementation is fastest here: each is measured once per machine, the answer kept on disk.

Dense is always among the candidates, so what is chosen for a number of tokens is never slower than dense was. Timings
are those of the weights themselves, taken in turn, as a model reads them: what stays in a cache from one call to the
next would flatter the larger candidate. Where the machine was busy at the time, delete `gate.json` in the cache folder
(`$XDG_CACHE_HOME/llmprune`, or `~/.cache/llmprune`) to measure anew.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmprune.errors import first_line
from llmprune.sparse.forms import Form, Step
from llmprune.sparse.machine import Machine, machine_of
from llmprune_kernels.native import cache_folder

TOKENS = (1, 4, 16, 64, 256)
WRONG = 0.02  # of the largest output: more than rounding explains
SAMPLE_BYTES = 256 << 20  # dense weights that are measured: more than a processor's cache holds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds of one product with a weight, by kernel, and the settings of the kernels that have some."""

    tokens: int
    seconds: Mapping[str, float]
    settings: Mapping[str, int] = field(default_factory=dict)

    def fastest(self, among: Iterable[str]) -> str:
        """Return the fastest of some kernels; where dense is no faster than another, the other."""
        known = [kernel for kernel in among if kernel in self.seconds]
        return min(known, key=lambda kernel: (self.seconds[kernel], kernel == "dense"))


@dataclass(frozen=True)
class Verdict:
    """What was measured for the weights of one shape, and what follows from it."""

    timings: tuple[Timing, ...]

    def fastest(self, tokens: int) -> str:
        """Return the fastest kernel at the measured number of tokens nearest to `tokens`."""
        nearest = min(self.timings, key=lambda timing: abs(timing.tokens - tokens))
        return nearest.fastest(nearest.seconds)

    def steps(self, kernels: Sequence[Sequence[str]]) -> tuple[Step, ...]:
        """Return which kernel to run from which number of tokens on, if a layer keeps forms with these kernels."""
        place = {kernel: number for number, group in enumerate(kernels) for kernel in group}
        steps: list[Step] = []
        for timing in (each for each in self.timings if place.keys() & each.seconds.keys()):
            kernel = timing.fastest(place)
            step = Step(timing.tokens if steps else 1, place[kernel], kernel, timing.settings.get(kernel, 0))
            if not steps or (steps[-1].kernel, steps[-1].setting) != (kernel, step.setting):
                steps.append(step)
        return tuple(steps)


def judge(
    packed: Sequence[Sequence[Form]],
    dense: Callable[[], Sequence[Tensor]],
    tokens: Iterable[int] = TOKENS,
    machine: Machine | None = None,
) -> Verdict:
    """Measure products with weights [O, I] of one shape, dense and in sparse forms, for each number of tokens.

    Args:
        packed: for each form, the weights in it.
        dense: returns the same weights dense, in the same order; asked only if something has to be measured.
        machine: what measures; by default that of the weights' device.
    """
    first = packed[0][0]
    machine = machine or machine_of(first.device)
    kernels = [kernel for forms in packed for kernel in forms[0].kernels]
    share = round(first.share() * 20) / 20  # weights of nearly the same share cost the same
    described = f"{machine.name} {first.dtype} {(first.outputs, first.inputs)} {share:.2f} {'+'.join(kernels)}"
    known, weights = _read(), cache(dense)
    timings = []
    for count in sorted(set(tokens)):
        key = f"{described} {count}"
        if key not in known:
            known = _write(key, _measure(weights(), packed, count, machine))
        timings.append(Timing(**known[key]))
    return Verdict(tuple(timings))


def _measure(weights: Sequence[Tensor], packed: Sequence[Sequence[Form]], tokens: int, machine: Machine) -> Timing:
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(tokens, weights[0].shape[1], generator=generator).to(weights[0])
    candidates: dict[str, Callable[[int], Tensor]] = {"dense": lambda index: functional.linear(x_TI, weights[index])}
    expected_TO = candidates["dense"](0)
    settings = {}
    for forms in packed:
        for kernel in forms[0].kernels:
            setting = _working(forms[0], kernel, x_TI, expected_TO)
            if setting is not None:
                settings[kernel] = setting
                candidates[kernel] = _product(x_TI, forms, kernel, setting)
    seconds = machine.seconds(list(candidates.values()), len(weights))
    named = {kernel: setting for kernel, setting in settings.items() if setting}
    return Timing(tokens, dict(zip(candidates, seconds, strict=True)), named)


def _product(x_TI: Tensor, forms: Sequence[Form], kernel: str, setting: int) -> Callable[[int], Tensor]:
    return lambda index: forms[index].linear(x_TI, kernel, setting, None)


def _working(form: Form, kernel: str, x_TI: Tensor, expected_TO: Tensor) -> int | None:
    """Return a kernel's setting; None, with one line in the log, where it fails or computes something else here."""
    try:
        setting = form.search(x_TI, kernel)
        found_TO = form.linear(x_TI, kernel, setting, None)
        error = float((found_TO.float() - expected_TO.float()).abs().max())
    except Exception as failure:  # whatever a compiler, a driver or a library may raise: dense is left
        logger.warning("sparse kernel %s is not used, as it fails here: %s", kernel, first_line(failure))
        return None
    if not error <= WRONG * float(expected_TO.float().abs().max()):
        logger.warning("sparse kernel %s is not used, as its results are off by %g here", kernel, error)
        return None
    return setting


def _file() -> Path:
    return cache_folder() / "gate.json"


def _read() -> dict[str, Any]:
    """Return what is on disk: nothing where nothing was measured yet."""
    try:
        found: dict[str, Any] = json.loads(_file().read_bytes())
        for timing in found.values():
            if not min(Timing(**timing).seconds.values()) > 0:
                raise ValueError("a kernel takes time")
        return found
    except OSError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        logger.warning("%s is damaged: kernels are measured anew", _file())
        return {}


def _write(key: str, timing: Timing) -> dict[str, Any]:
    """Return all that is known now, and keep it for the next process; where the disk is full, that one measures anew."""
    known = _read() | {key: vars(timing)}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        partial = _file().with_suffix(f".{time.monotonic_ns()}")
        partial.write_text(json.dumps(known, indent=1), "utf-8")
        partial.replace(_file())
    except OSError:
        logger.debug("%s cannot be written", _file())
    return known
