"""The line of a run for methods that need gradients: forward through the dense model, then block by block in reverse.

A block is solved as soon as the backward pass has come through it, and only blocks before it are still run: so all
gradients are the dense model's, and those of one block at a time are in memory.
"""

from collections.abc import Generator
from typing import Any, cast

import torch
from torch import Tensor

from llmprune.model import Lanes
from llmprune.model.gradients import Tape
from llmprune.model.groups import Group
from llmprune.model.memory import home_device, most_kept
from llmprune.model.sites import Stage
from llmprune.planning import Host, Plan
from llmprune.progress import Progress

_UNREACHED = ("no token reached it: solved by magnitude",)


def fitting_rows(host: Host, rows: list[Tensor]) -> list[Tensor]:
    """Return as many sequences as may have their hidden states kept before every block."""
    return rows[: most_kept(rows, len(host.blocks), host.config, host.dtype)]


def reversed_stages(
    host: Host, plan: Plan, rows: list[Tensor], home: torch.device
) -> Generator[tuple[Stage, list[Group]], None, None]:
    """Yield the stages that have sites or are blocks, the last first, loaded, each site with its `Gradient`.

    Raises:
        UnsupportedModelError: gradients cannot be followed through the model.
        NumericalError: a gradient holds NaN or infinity.
    """
    blocks = host.blocks
    with (
        Lanes(host.model, [*blocks, host.head], [row[None] for row in rows], home, host.device_of) as lanes,
        Progress(2 * len(blocks), "pruning", "block") as bar,
    ):
        shelf = home_device(host.place, rows * len(blocks), host.config, host.dtype)
        tape = Tape(lanes, of_weights=True, labels="text", shelf=shelf)
        for index, block in enumerate(blocks[:-1]):
            host.load(block)
            tape.forward(index)
            host.free(block)
            bar.step()
        for stage, found in tape.backward(host, len(blocks) - 1, plan.sites):
            groups = [
                Group([site], statistic=cast(Any, gradient)) if gradient.tokens else Group([site], notes=_UNREACHED)
                for site, gradient in found.items()
            ]
            yield stage, groups
            bar.step()
