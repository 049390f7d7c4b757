"""Time what ranks need to hand round what the sites of a block are fed, and nothing else: nothing is summed.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 scripts/bench_exchange.py

Prints one JSON row for each number of tokens: milliseconds a turn, in which each rank gives what one sequence feeds the
four groups of the block of `bench_ranks.py`, and bytes a second that come to each rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from torch import nn

from llmprune.model.groups import Group
from llmprune.model.sites import Site
from llmprune.model.tally import Tally
from llmprune.statistics import Gram
from llmprune.team.joining import joined
from llmprune.team.parcels import Parcels

WIDTHS = (640, 640, 640, 1728)
CPU = torch.device("cpu")


class Unsummed(Gram):
    """A Gram matrix that counts what it is given, and sums none of it."""

    def add(self, x_TI: torch.Tensor, sequences: int, **how: Any) -> None:
        self.sequences += sequences


def milliseconds(parcels: Parcels, tokens: int, turns: int) -> float:
    """Return the time of a turn, without that of the first ones, in which buffers grow."""
    modules = [nn.Linear(width, 1, bias=False) for width in WIDTHS]
    groups = [Group([Site("weight", module, "weight", (1, module.in_features), False)]) for module in modules]
    inputs = [torch.randn(tokens, width) for width in WIDTHS]
    tally = Tally(parcels, Unsummed, groups, 1.0)

    def turn() -> None:
        for number, x_TI in enumerate(inputs):
            tally.take(number, 1, [x_TI])
        tally.end_turn()

    for _ in range(turns // 4):
        turn()
    parcels.team.gather(None)
    started = time.perf_counter()
    for _ in range(turns):
        turn()
    return 1e3 * (time.perf_counter() - started) / turns


def main() -> None:
    """Print the rows, on the first rank."""
    parser = argparse.ArgumentParser(description="Time how ranks hand inputs round.")
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--turns", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sockets", action="store_true", help="as between machines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with joined() as team:
        parcels = Parcels(team, CPU, shared=not arguments.sockets)
        for tokens in arguments.tokens:
            took = [milliseconds(parcels, tokens, arguments.turns) for _ in range(arguments.rounds)]
            middle = statistics.median(took)
            come = 4 * tokens * sum(WIDTHS) * (team.size - 1)
            row = {"ranks": team.size, "tokens": tokens, "ms": round(middle, 2), "least_ms": round(min(took), 2)}
            if team.leads:
                print(json.dumps(row | {"gb_per_second": round(come / middle / 1e6, 2)}), flush=True)


if __name__ == "__main__":
    main()
