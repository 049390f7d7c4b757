"""Gradients of a model that is never whole in memory are those of plain autograd on the whole of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from llmprune.checkpoint import Source
from llmprune.model import Lanes, Streamed
from llmprune.model.gradients import Labels, Tape
from llmprune.model.sites import Site, Stage, is_router, sites_of
from llmprune.statistics import Gradient

CPU = torch.device("cpu")
IDS = tiny.ids(3, 16)
FAMILIES = ["llama", "llama-tied", "qwen3", "gpt2", "opt", "gemma2", *tiny.EXPERTS]


def gradients(host: Any, labels: Labels = "text", ids: Tensor = IDS) -> dict[str, Gradient]:
    stages: list[Stage] = [*host.blocks, host.head]
    sites = {stage.name: [site for site in sites_of(stage) if not is_router(site.tensor)] for stage in stages}
    found: dict[str, Gradient] = {}
    with Lanes(host.model, stages, [row[None] for row in ids], CPU, host.device_of) as lanes:
        tape = Tape(lanes, of_weights=True, labels=labels)
        for index, stage in enumerate(host.blocks[:-1]):
            host.load(stage)
            tape.forward(index)
            host.free(stage)
        for _, of_stage in tape.backward(host, len(host.blocks) - 1, sites):
            found |= {site.name: gradient for site, gradient in of_stage.items()}
    return found


def streamed(folder: Path) -> Streamed:
    host = Streamed(Source.open(folder), CPU)
    host.open(CPU)
    return host


def by_autograd(made: Any, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Return the sums over sequences of the squared gradients of all weights, by plain autograd on the whole model."""
    squares = {name: torch.zeros_like(parameter) for name, parameter in made.named_parameters()}
    for row in ids:
        made.zero_grad()
        logits = made(input_ids=row[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        for name, parameter in made.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad.square()
    return squares


def of_site(site: Site, whole: dict[str, Tensor]) -> Tensor:
    return site.view(whole[site.tensor])


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family), tmp_path / family)
    host = streamed(folder)
    found, whole = gradients(host), by_autograd(tiny.load(folder))
    sites = [site for stage in [*host.blocks, host.head] for site in sites_of(stage) if not is_router(site.tensor)]
    assert {site.name for site in sites} == set(found)
    for site in sites:
        if family == "llama-tied" and site.tensor == "lm_head.weight":
            continue  # autograd adds the gradient of the embedding
        expected = whole.get(site.tensor)
        assert expected is not None or family == "gemma2"
        if expected is not None:
            square_OI = found[site.name].square_OI
            assert square_OI is not None
            torch.testing.assert_close(
                square_OI, of_site(site, whole), rtol=1e-4, atol=1e-5 * float(of_site(site, whole).max())
            )
