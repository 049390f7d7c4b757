"""A forward that multiplies in bfloat16 beside weights of float32, whatever it writes into what."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import llmprune
import tiny
from llmprune.model import Lanes, Resident
from llmprune.model.precision import multiplying_in

CPU = torch.device("cpu")
AT = torch.tensor([0, 2])
MASK = torch.tensor([True, False, True])


def assign(into: Tensor, values: Tensor) -> None:
    into[MASK] = values


WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda into, values: into.index_add_(0, AT, values),
    lambda into, values: into.index_add_(dim=0, index=AT, source=values),
    lambda into, values: into.index_copy_(0, AT, values),
    lambda into, values: into.index_put_((AT,), values),
    lambda into, values: into.masked_scatter_(MASK[:, None], values),
    lambda into, values: into.scatter_(0, torch.zeros(2, 4, dtype=torch.int64), values),
    lambda into, values: into.scatter_add_(0, torch.zeros(2, 4, dtype=torch.int64), values),
    assign,
]


@pytest.mark.parametrize("write", WRITES)
def test_values_of_another_precision_can_be_written_into_part_of_a_tensor(
    write: Callable[[Tensor, Tensor], Any],
) -> None:
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    into, expected = torch.zeros(3, 4), torch.zeros(3, 4)
    write(expected, values.float())
    with pytest.raises(RuntimeError):  # torch's own
        write(into, values)
    with multiplying_in(torch.bfloat16, CPU):
        write(into, values)
    assert torch.equal(into, expected) and into.any()


def test_whole_numbers_stay_whole() -> None:
    into = torch.zeros(3, dtype=torch.int64)
    with multiplying_in(torch.bfloat16, CPU):
        into.index_add_(0, AT, torch.tensor([5, 7]))
        with pytest.raises(RuntimeError):
            into.index_add_(0, AT, torch.tensor([0.5, 0.5]))
    assert into.tolist() == [5, 0, 7]


def test_gradients_flow_back_through_a_write() -> None:
    values = torch.ones(2, 4, requires_grad=True)
    with multiplying_in(torch.bfloat16, CPU):
        product = values @ torch.eye(4)
        written = torch.zeros(3, 4).index_add(0, AT, product)
    assert product.dtype == torch.bfloat16 and written.dtype == torch.float32
    written.sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.ones(2, 4))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.EXPERTS])
def test_every_family_runs_in_bfloat16(family: str) -> None:
    host, ids = Resident(tiny.model(family)), tiny.ids(2, 16)
    stages = [*host.blocks, host.head]
    with Lanes(host.model, stages, [ids], CPU, host.device_of, torch.bfloat16) as lanes:
        for index in range(len(stages)):
            lanes.advance(index)
        logits = lanes.outputs()[0].logits
    plain = tiny.logits(host.model, ids)
    assert not torch.equal(logits.float(), plain)
    assert float((logits.float() - plain).norm()) < 0.3 * float(plain.norm())  # routers may choose other experts


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_a_preset_prunes_experts_that_are_added_up_in_place(preset: str) -> None:
    report = llmprune.prune(tiny.model("dbrx"), preset=preset, pattern="60%", calibration=tiny.ids(4, 16))
    assert report.zeros == pytest.approx(0.6 * report.site_parameters, rel=0.01)
