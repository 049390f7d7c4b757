"""The line of a run for methods that need gradients: forward through the dense model, then block by block in reverse.

A block is solved as soon as the backward pass has come through it, and only blocks before it are still run: so all
gradients are the dense model's, and those of one block at a time are in memory.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from llmprune.model import Lanes
from llmprune.model.gradients import Tape
from llmprune.model.groups import Group
from llmprune.model.memory import home_device, most_kept, out_of_memory_in
from llmprune.model.sites import Stage
from llmprune.progress import Progress
from llmprune.run import Run

_UNREACHED = ("no token reached it: solved by magnitude",)


@dataclass(frozen=True)
class ReverseRun(Run):
    """A run whose sites are solved from their `Gradient`, the last block first."""

    def _stream(self) -> None:
        rows = self._rows()
        with closing(self._reversed_stages(self.team.share(rows))) as stages:
            while True:
                with out_of_memory_in("the backward pass"), self.report.clock.phase("gradients"):
                    stage, groups = next(stages, (None, []))
                if stage is None:
                    break
                if stage in self.plan.stages and not self.store.has(stage):
                    sites = self.plan.sites.get(stage.name, [])
                    self.store.begin(stage, sites)
                    self._solve(stage, groups)
                    with self.report.clock.phase("write"):
                        self.store.keep(stage, sites)
        if self.tokens and len(rows) < len(self.tokens.rows):
            self.report.notes.append(f"gradients are those of {len(rows)} sequences, to bound their memory")

    def _rows(self) -> list[Tensor]:
        """Return as many sequences as may have their hidden states kept before every block."""
        rows = self.tokens.rows if self.tokens else []
        return rows[: self.team.tell(most_kept(rows, len(self.host.blocks), self.host.config, self.host.dtype))]

    def _reversed_stages(self, rows: list[Tensor]) -> Generator[tuple[Stage, list[Group]], None, None]:
        """Yield the head and the blocks, the last first, loaded, each site with its gradient.

        Raises:
            UnsupportedModelError: gradients cannot be followed through the model.
            NumericalError: a gradient holds NaN or infinity.
        """
        host, blocks = self.host, self.host.blocks
        stops = [*blocks, host.head]
        with (
            Lanes(host.model, stops, [row[None] for row in rows], self.home, host.device_of) as lanes,
            Progress(2 * len(blocks), "pruning", "block") as bar,
        ):
            shelf = home_device(host.device, rows * len(blocks), host.config, host.dtype)
            tape = Tape(lanes, of_weights=True, labels="text", shelf=shelf, team=self.team)
            for index, block in enumerate(blocks[:-1]):
                self.team.at(block.name)
                host.load(block)
                tape.forward(index)
                host.free(block)
                bar.step()
            self.team.at("the backward pass")
            for stage, found in tape.backward(host, len(blocks) - 1, self.plan.sites):
                groups = [
                    Group([site], statistic=cast(Any, gradient)) if gradient.tokens else Group([site], notes=_UNREACHED)
                    for site, gradient in found.items()
                ]
                yield stage, groups
                bar.step()
                self.team.at(f"the backward pass from {stage.name}")
