"""Gradients of the sequences of several ranks, summed in the order in which one process goes through these."""

from collections.abc import Collection

import torch

from llmprune.statistics import Gradient
from llmprune.team.team import Team


def close_turn(team: Team, gradients: Collection[Gradient], ran: bool) -> None:
    """Close the sequences of this turn, of which each rank has run one, on all ranks and in their order.

    Args:
        team: the ranks.
        gradients: of the same sites on all ranks.
        ran: whether there was a sequence for this rank.
    """
    told = team.gather([gradient.open_tokens for gradient in gradients] if ran else None)
    for rank, tokens in enumerate(told):
        for gradient, count in zip(gradients, tokens or (), strict=tokens is not None):
            _close(team, rank, gradient, count)


def _close(team: Team, rank: int, gradient: Gradient, tokens: int) -> None:
    """Add a rank's sequence, of which so many tokens have come to the site; gradients are handed round if any have."""
    mine = rank == team.rank
    parts = gradient.open if mine else [torch.zeros_like(part) for part in gradient.open]
    if tokens:
        for part in parts:
            team.hand(part, rank)
    if mine:
        gradient.close_sequence()
    else:
        gradient.add_sequence(parts, tokens)
