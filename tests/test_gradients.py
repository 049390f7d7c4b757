"""Gradients of a model that is never whole in memory are those of plain autograd on the whole of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from llmprune.checkpoint import Source
from llmprune.errors import NumericalError, UnsupportedModelError
from llmprune.model import Lanes, Resident, Streamed
from llmprune.model.gradients import Labels, Tape
from llmprune.model.sites import Site, Stage, is_router, sites_of
from llmprune.statistics import Gradient

CPU = torch.device("cpu")
IDS = tiny.ids(3, 16)
FAMILIES = ["llama", "llama-tied", "qwen3", "gpt2", "opt", "gemma2", *tiny.EXPERTS]


def gradients(
    host: Any, labels: Labels = "text", ids: Tensor = IDS, seed: int = 0, most: int | None = None
) -> dict[str, Gradient]:
    stages: list[Stage] = [*host.blocks, host.head]
    sites = {stage.name: [site for site in sites_of(stage) if not is_router(site.tensor)] for stage in stages}
    found: dict[str, Gradient] = {}
    with Lanes(host.model, stages, [row[None] for row in ids], CPU, host.device_of) as lanes:
        tape = Tape(lanes, of_weights=True, labels=labels, seed=seed, most=most)
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


def check(family: str, found: dict[str, Gradient], sites: list[Site], whole: dict[str, Tensor]) -> None:
    assert {site.name for site in sites} == set(found)
    for site in sites:
        if site.tensor not in whole or (family == "llama-tied" and site.tensor == "lm_head.weight"):
            continue  # a tied head: autograd adds the gradient of the embedding
        expected_OI, square_OI = site.view(whole[site.tensor]), found[site.name].square_OI
        assert square_OI is not None and float(expected_OI.max()) > 0
        torch.testing.assert_close(square_OI, expected_OI, rtol=1e-5, atol=1e-5 * float(expected_OI.max()))


def all_sites(host: Any) -> list[Site]:
    return [site for stage in [*host.blocks, host.head] for site in sites_of(stage) if not is_router(site.tensor)]


def test_the_first_lanes_alone_are_followed_where_that_is_asked_for() -> None:
    host = Resident(tiny.model("llama"))
    whole, part = gradients(host, ids=IDS[:2]), gradients(host, most=2)
    for name, gradient in whole.items():
        first_OI, square_OI = gradient.square_OI, part[name].square_OI
        assert first_OI is not None and square_OI is not None and torch.equal(first_OI, square_OI)
        assert gradient.sequences == part[name].sequences == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_gradients_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(family), tmp_path / family)
    host = streamed(folder)
    check(family, gradients(host), all_sites(host), by_autograd(tiny.load(folder)))
    assert all(parameter.is_meta for block in host.blocks for parameter in block.module.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_a_loaded_models_gradients_leave_no_trace_on_it(family: str) -> None:
    made = tiny.model(family)
    host = Resident(made)
    wanted = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    check(family, gradients(host), all_sites(host), by_autograd(tiny.model(family)))
    assert all(parameter.grad is None for parameter in made.parameters())
    assert {name: parameter.requires_grad for name, parameter in made.named_parameters()} == wanted


def outputs_by_autograd(made: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return the sums over tokens of the squared gradients of all Linear outputs, by plain autograd."""
    squares: dict[str, Tensor] = {}
    for name, module in made.named_modules():
        if isinstance(module, nn.Linear):

            def hook(module: nn.Module, args: Any, y: Tensor, name: str = f"{name}.weight") -> None:
                def add(g: Tensor) -> None:
                    squares[name] = squares.get(name, torch.zeros(g.shape[-1])) + g.flatten(0, -2).square().sum(0)

                y.register_hook(add)

            module.register_forward_hook(hook)
    for row, label in zip(IDS, labels, strict=True):
        logits = made(input_ids=row[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[: len(label)], label, reduction="sum").backward()
    return squares


def test_gradients_of_outputs_are_those_of_the_whole_model(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model("llama"), tmp_path / "llama")
    expected = outputs_by_autograd(tiny.load(folder), IDS[:, 1:])
    for name, gradient in gradients(streamed(folder)).items():
        torch.testing.assert_close(gradient.square_O, expected[name], rtol=1e-4, atol=1e-6)
        assert gradient.tokens == IDS.numel() and gradient.sequences == len(IDS)


def test_labels_are_sampled_from_the_models_own_predictions(tmp_path: Path) -> None:
    """Over many draws the mean of squared gradients is that of the true Fisher: Σ_y p(y) (dL_y/dlogit)²."""
    folder = tiny.save(tiny.model("llama"), tmp_path / "llama")
    p_LV = torch.cat([tiny.logits(tiny.load(folder), row[None])[0].softmax(-1) for row in IDS])
    expected_V = (p_LV * (1 - p_LV)).sum(0)  # E[(p - y)²] of a one-hot y drawn from p
    found_V = torch.stack(
        [gradients(streamed(folder), "sampled", seed=seed)["lm_head.weight"].square_O for seed in range(12)]
    ).mean(0)
    assert float(found_V.sum()) == pytest.approx(float(expected_V.sum()), rel=0.1)
    again, other = (gradients(streamed(folder), "sampled", seed=seed)["lm_head.weight"].square_O for seed in (0, 12))
    first = gradients(streamed(folder), "sampled", seed=0)["lm_head.weight"].square_O
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_model_that_changes_hidden_states_between_blocks_is_refused() -> None:
    made: Any = tiny.model("llama")
    made.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(UnsupportedModelError, match=r"gradients cannot be followed past model\.layers\.0"):
        gradients(Resident(made))


def test_gradients_that_overflow_are_named(tmp_path: Path) -> None:
    made = tiny.model("llama")
    with torch.no_grad():
        made.lm_head.weight.mul_(1e30)
    with pytest.raises(NumericalError, match="its gradients hold NaN or infinity"):
        gradients(Resident(made))
