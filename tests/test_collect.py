"""What sites are fed is seen wherever it is multiplied, summed once per shared input, and never lost or mixed up."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from llmprune.errors import UnsupportedModelError
from llmprune.model import Lanes, Resident
from llmprune.model.collect import Collector
from llmprune.model.groups import Group, StatisticType, first_lane
from llmprune.model.sites import Site, Stage, sites_of
from llmprune.statistics import ColumnNorm, CrossGram, Gram

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def lanes_of(host: Resident, batches: Sequence[Tensor]) -> Lanes:
    return Lanes(host.model, host.blocks, batches, CPU, host.device_of)


def collected(lanes: Lanes, index: int, sites: Sequence[Site], needs: StatisticType) -> list[Group]:
    return list(Collector(lanes, needs, budget=1 << 30).groups(index, sites))


def short_names(groups: Sequence[Group]) -> list[list[str]]:
    return [[site.name.split(".")[-2] for site in group.sites] for group in groups]


GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "qwen3": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gemma2": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
}


@pytest.mark.parametrize("family", GROUPS)
def test_sites_that_read_one_input_share_a_group(family: str) -> None:
    host = Resident(tiny.model(family))
    with lanes_of(host, [tiny.ids(2), tiny.ids(1, 9)]) as lanes:
        sites = sites_of(host.blocks[0])
        found = collected(lanes, 0, sites, Gram)
        assert [sorted(names) for names in short_names(found)] == [sorted(names) for names in GROUPS[family]]
        assert short_names(first_lane(lanes, 0, sites)[0]) == short_names(found)


@pytest.mark.parametrize("needs", [Gram, ColumnNorm])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_are_those_of_the_models_own_forward(family: str, needs: type[Gram] | type[ColumnNorm]) -> None:
    host, batches = Resident(tiny.model(family)), [tiny.ids(2), tiny.ids(1, 9)]
    sites = sites_of(host.blocks[1])
    expected = {site: needs(site.shape[1], CPU) for site in sites}

    def hook_for(site: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for sequence in args[0]:
                expected[site].add(sequence, 1)

        return hook

    handles = [site.module.register_forward_pre_hook(hook_for(site)) for site in sites]
    for batch in batches:
        tiny.logits(host.model, batch)
    for handle in handles:
        handle.remove()
    with lanes_of(host, batches) as lanes:
        lanes.advance(0)
        groups = collected(lanes, 1, sites, needs)
    for group in groups:
        for site in group.sites:
            assert same_statistic(group.statistic, expected[site])


@pytest.mark.parametrize("budget", [1 << 30, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_where_weights_stay_lanes_go_on_from_the_run_that_was_seen(family: str, budget: int) -> None:
    host, batches = Resident(tiny.model(family)), [tiny.ids(2), tiny.ids(1, 9)]
    runs = [0] * len(host.blocks)
    for index, block in enumerate(host.blocks):
        block.module.register_forward_pre_hook(partial(_count, runs, index))
    with lanes_of(host, batches) as lanes:
        for index, block in enumerate(host.blocks):
            list(Collector(lanes, Gram, budget, stays_dense=True).groups(index, sites_of(block)))
            seen = runs[index]
            lanes.advance(index)
            assert runs[index] - seen == (len(batches) if family == "qwen3-moe" else 0)  # whose experts ran one by one
        outputs = [output.logits for output in lanes.outputs()]
    for batch, logits in zip(batches, outputs, strict=True):
        assert torch.equal(logits, tiny.logits(host.model, batch))


def test_a_lane_goes_on_from_its_first_run_alone() -> None:
    host = Resident(tiny.model("llama"))
    ends = [0]
    with lanes_of(host, [tiny.ids(2), tiny.ids(1, 9)]) as lanes:
        host.blocks[0].module.register_forward_hook(partial(_count, ends, 0))
        collector = Collector(lanes, Gram, 1, stays_dense=True)
        list(collector.groups(0, sites_of(host.blocks[0])))
    assert collector.most_runs > 1 and ends == [2]


def _count(runs: list[int], index: int, *_: Any) -> None:
    runs[index] += 1


def same_statistic(a: Any, b: Any) -> bool:
    sums = (a.hessian_II, b.hessian_II) if isinstance(a, Gram) else (a.sum_I, b.sum_I)
    return torch.equal(*sums) and (a.tokens, a.sequences) == (b.tokens, b.sequences)


@pytest.mark.parametrize("needs", [Gram, ColumnNorm])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_small_budget_costs_runs_and_changes_nothing(family: str, needs: type[Gram] | type[ColumnNorm]) -> None:
    host = Resident(tiny.model(family))
    with lanes_of(host, [tiny.ids(2), tiny.ids(1, 9), tiny.ids(2, 9)]) as lanes:
        sites = sites_of(host.blocks[0])
        at_once, bit_by_bit = Collector(lanes, needs, 1 << 30), Collector(lanes, needs, 1)
        together, apart = list(at_once.groups(0, sites)), list(bit_by_bit.groups(0, sites))
        assert at_once.most_runs == 1 < bit_by_bit.most_runs
        by_name = {group.sites[0].name: group for group in apart}
        assert by_name.keys() == {group.sites[0].name for group in together}
        for group in together:
            other = by_name[group.sites[0].name]
            assert same_statistic(group.statistic, other.statistic)
            assert group.notes == other.notes
        assert not any(module._forward_pre_hooks for module in host.blocks[0].module.modules())


def test_what_is_read_last_is_yielded_first_when_the_budget_is_small() -> None:
    """Solving it then changes nothing that is still to be measured."""
    host = Resident(tiny.model("llama"))
    with lanes_of(host, [tiny.ids(2)]) as lanes:
        groups = list(Collector(lanes, Gram, 1).groups(0, sites_of(host.blocks[0])))
    assert short_names(groups) == GROUPS["llama"][::-1]


def test_a_site_that_reads_nothing_is_in_no_group() -> None:
    model = tiny.model("llama")
    block: Any = model.get_submodule("model.layers.0")
    block.spare = nn.Linear(64, 64)
    host = Resident(model)
    with lanes_of(host, [tiny.ids(2)]) as lanes:
        groups = collected(lanes, 0, sites_of(host.blocks[0]), Gram)
    assert short_names(groups) == GROUPS["llama"]


def test_experts_without_tokens_do_not_share_a_group() -> None:
    """Empty tensors have no address by which they could be told apart."""
    block, stage_input = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), torch.ones(2, 4)

    def forward(x: Tensor) -> Tensor:
        first, second = block
        return torch.cat([first(x[:0]), second(x[2:]), x])

    block.forward = forward
    stage = Stage("experts", block)
    model = nn.Module()
    model.forward = lambda input_ids, use_cache: block(stage_input)
    model.block = block
    with Lanes(model, [stage], [tiny.ids(1, 2)], CPU, lambda stage: CPU) as lanes:
        assert len(first_lane(lanes, 0, sites_of(stage))[0]) == 2


@pytest.mark.parametrize("needs", [Gram, ColumnNorm])
def test_a_starved_expert_is_shrunk_towards_the_pooled_statistic(needs: type[Gram] | type[ColumnNorm]) -> None:
    """By the share of tokens that it lacks, each statistic taken per token."""
    x_full, x_few = torch.randn(2, 12, 8), torch.randn(1, 2, 8)
    stage, lanes = expert_lanes([x_full, x_few])
    with lanes:
        fed = list(Collector(lanes, needs, 1 << 20).groups(0, sites_of(stage)))
    full, few, none = (group.statistic for group in sorted(fed, key=lambda group: group.sites[0].name))
    assert full and few and none
    assert [statistic.tokens for statistic in (full, few, none)] == [24, 2, 0]
    grams = [x.reshape(-1, 8).T @ x.reshape(-1, 8) for x in (x_full, x_few)]
    pooled = (grams[0] + grams[1]) / 26
    for statistic, expected in ((few, 0.25 * grams[1] / 2 + 0.75 * pooled), (none, pooled)):
        assert proportional(matrix(statistic), expected if needs is Gram else expected.diagonal())


def test_experts_of_which_none_is_reached_have_no_statistic_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    stage, lanes = expert_lanes([])
    with lanes:
        fed = list(Collector(lanes, Gram, 1 << 20).groups(0, sites_of(stage)))
    assert [group.statistic for group in fed] == [None] * 3
    assert all("magnitude" in group.notes[0] for group in fed)
    assert "no token reached any expert" in caplog.text


@pytest.mark.parametrize("needs", [Gram, ColumnNorm])
@pytest.mark.parametrize("family", GROUPS)
def test_lanes_side_by_side_see_what_runs_group_by_group_see(family: str, needs: type[Gram] | type[ColumnNorm]) -> None:
    """With every site changed once it is yielded, as pruning does, and in one run of the block instead of many."""
    batches = [tiny.ids(2), tiny.ids(1, 9), tiny.ids(2, 9)]
    fed, outputs, runs = [], [], []
    for side_by_side in (True, False):
        host = Resident(tiny.model(family))
        with lanes_of(host, batches) as lanes:
            collector = Collector(lanes, needs, 1 << 30, true_sequential=True, side_by_side=side_by_side)
            found = {}
            for index in range(2):
                with counting_calls(host.blocks[index].module) as calls:
                    for group in collector.groups(index, sites_of(host.blocks[index])):
                        for site in group.sites:
                            found[site.name] = matrix(group.statistic).clone()
                            host.weight(site).mul_(0.5)
                    lanes.advance(index)
                runs.append(len(calls))
            fed.append(found)
            outputs.append([lanes.run(2, lane) for lane in range(len(batches))])
    assert fed[0].keys() == fed[1].keys()
    assert all(torch.equal(fed[0][name], fed[1][name]) for name in fed[0])
    assert all(torch.equal(first(a), first(b)) for a, b in zip(*outputs, strict=True))
    assert runs[:2] == [len(batches)] * 2
    assert runs[2] > len(batches)


@pytest.mark.parametrize("family", [*GROUPS, "qwen3-moe"])
def test_the_dense_models_lanes_stay_those_of_the_dense_model(family: str) -> None:
    """Whatever becomes of the weights, also where experts keep lanes from going side by side."""
    batches, host = [tiny.ids(2), tiny.ids(1, 9)], Resident(tiny.model(family))
    expected = [tiny.logits(host.model, batch) for batch in batches]
    stages = [*host.blocks, host.head]
    with Lanes(host.model, stages, batches * 2, CPU, host.device_of) as lanes:
        collector = Collector(lanes, CrossGram, 1 << 30, true_sequential=True, side_by_side=True, dense_stream=True)
        for index, block in enumerate(host.blocks):
            for group in collector.groups(index, sites_of(block)):
                for site in group.sites:
                    host.weight(site).mul_(0.5)
            lanes.advance(index)
        lanes.advance(len(host.blocks))
        logits = [output.logits for output in lanes.outputs()]
    assert all(torch.equal(a, b) for a, b in zip(logits[2:], expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(logits[:2], expected, strict=True))


def test_a_statistic_is_let_go_of_before_the_next_one_is_summed() -> None:
    """With `side_by_side` there is one at a time, however wide they are."""
    alive, host = weakref.WeakSet[Gram](), Resident(tiny.model("llama"))
    others = []

    class Watched(Gram):
        def __init__(self, inputs: int, device: torch.device) -> None:
            super().__init__(inputs, device)
            others.append(len(alive))
            alive.add(self)

    with Lanes(host.model, [*host.blocks, host.head], [tiny.ids(2)], CPU, host.device_of) as lanes:
        collector = Collector(lanes, Watched, 1 << 30, true_sequential=True, side_by_side=True)
        for group in collector.groups(0, sites_of(host.blocks[0])):
            group.statistic = None
    assert others == [0] * 4


def test_the_dense_models_inputs_are_related_to_the_pruned_ones() -> None:
    """For a block of two matrices, the second is fed by the first, which is pruned."""
    first_weight, x = torch.randn(4, 4), torch.randn(2, 50, 4)
    block: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False))
    block[0].weight.data.copy_(first_weight)
    model: Any = nn.Module()
    model.block = block
    model.forward = lambda input_ids, use_cache: block(x)
    stage = Stage("block", block)
    with Lanes(model, [stage], [tiny.ids(2, 50)] * 2, CPU, lambda stage: CPU) as lanes:
        collector = Collector(lanes, CrossGram, 1 << 30, true_sequential=True, side_by_side=True, dense_stream=True)
        groups = collector.groups(0, sites_of(stage))
        next(groups).sites[0].module.get_parameter("weight").data.mul_(0.5)
        second: Any = next(groups).statistic
    dense, weight = (x @ first_weight.T).reshape(-1, 4), torch.randn(3, 4)
    found = second.target(weight, 1.0, 0.0)
    assert torch.allclose(found, 2 * weight, rtol=1e-3, atol=1e-3), "half the inputs need twice the weights"
    assert torch.allclose(second.hessian_II, 2 / 2 * (dense.T @ dense) / 4, rtol=1e-4)


def test_an_input_that_is_changed_in_place_is_told_from_what_it_was() -> None:
    """Each site is measured on what it was given, though both were given one tensor."""
    block: Any = nn.Module()
    block.one, block.two, x = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), torch.randn(1, 9, 4)
    scale = torch.linspace(0, 3, 4)

    def forward() -> Any:
        shared = x.clone()
        return block.one(shared) + block.two(shared.mul_(scale))

    block.forward = forward
    model: Any = nn.Module()
    model.block, model.forward = block, lambda input_ids, use_cache: block()
    stage = Stage("block", block)
    expected = [x[0].T @ x[0], (x[0] * scale).T @ (x[0] * scale)]
    ways: list[dict[str, Any]] = [{}, {"true_sequential": True}, {"true_sequential": True, "side_by_side": True}]
    for options in ways:
        with Lanes(model, [stage, Stage("end", nn.Identity())], [tiny.ids(1, 9)], CPU, lambda stage: CPU) as lanes:
            grams = [
                matrix(g.statistic).clone()
                for g in Collector(lanes, Gram, 1 << 20, **options).groups(0, sites_of(stage))
            ]
        assert all(proportional(gram, other) for gram, other in zip(grams, expected, strict=True))


def test_experts_with_two_input_matrices_keep_their_order_where_some_are_starved() -> None:
    """Gate and up of every expert come before down, also for experts that the first batch does not reach."""
    host = Resident(tiny.model("dbrx"))
    with lanes_of(host, [tiny.ids(1, 3), tiny.ids(2, 20)]) as lanes:
        groups = list(Collector(lanes, Gram, 1 << 30).groups(0, sites_of(host.blocks[0])))
    kinds = [group.sites[0].tensor[-2:] for group in groups if group.sites[0].expert is not None]
    assert kinds == sorted(kinds, key=["w1", "v1", "w2"].index) or kinds.index("w2") > max(
        place for place, kind in enumerate(kinds) if kind in ("w1", "v1")
    )


def test_a_site_that_is_used_twice_cannot_be_held_side_by_side() -> None:
    block: Any = nn.Module()
    block.one, x = nn.Linear(4, 4), torch.randn(1, 9, 4)
    block.forward = lambda: block.one(block.one(x))
    model: Any = nn.Module()
    model.block, model.forward = block, lambda input_ids, use_cache: block()
    stage = Stage("block", block)
    with Lanes(model, [stage, Stage("end", nn.Identity())], [tiny.ids(1, 9)], CPU, lambda stage: CPU) as lanes:
        collector = Collector(lanes, Gram, 1 << 20, true_sequential=True, side_by_side=True)
        with pytest.raises(UnsupportedModelError, match="used twice"):
            list(collector.groups(0, sites_of(stage)))


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def counting_calls(module: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(None))
    yield calls
    handle.remove()


def test_lanes_that_are_left_within_a_block_leave_no_trace() -> None:
    host = Resident(tiny.model("llama"))
    before = tiny.logits(host.model, tiny.ids(2))
    with lanes_of(host, [tiny.ids(2)]) as lanes:
        collector = Collector(lanes, Gram, 1 << 30, true_sequential=True, side_by_side=True)
        groups = collector.groups(0, sites_of(host.blocks[0]))
        next(groups)
        groups.close()
        assert not any(module._forward_pre_hooks for module in host.blocks[0].module.modules())
    assert torch.equal(tiny.logits(host.model, tiny.ids(2)), before)


def test_an_error_within_a_block_reaches_the_caller() -> None:
    host = Resident(tiny.model("llama"))
    with lanes_of(host, [tiny.ids(2)]) as lanes:
        host.model.get_submodule("model.layers.0.mlp").forward = lambda x: 1 / 0
        collector = Collector(lanes, Gram, 1 << 30, true_sequential=True, side_by_side=True)
        with pytest.raises(ZeroDivisionError):
            list(collector.groups(0, sites_of(host.blocks[0])))


def expert_lanes(inputs: Sequence[Tensor]) -> tuple[Stage, Lanes]:
    """Return a stage of three experts, the first of which are given `inputs`, and a lane that waits there."""
    block: Any = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward() -> None:
        for expert, x in zip(block.experts, inputs, strict=False):
            expert(x)

    block.forward = forward
    model = nn.Module()
    model.block = block
    model.forward = lambda input_ids, use_cache: block()
    stage = Stage("block", block)
    return stage, Lanes(model, [stage], [tiny.ids(1, 2)], CPU, lambda stage: CPU)


def matrix(statistic: Any) -> Tensor:
    return statistic.hessian_II if isinstance(statistic, Gram) else statistic.sum_I


def proportional(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a / a.norm(), b / b.norm(), atol=1e-5)


def test_a_weight_that_is_used_without_its_module_is_seen() -> None:
    """As Mamba's dt_proj: the weight times columns of inputs."""
    block: Any = nn.Module()
    block.dt_proj, x = nn.Linear(4, 6, bias=False), torch.randn(2, 4, 5)
    block.forward = lambda: block.dt_proj.weight @ x
    model = nn.Module()
    model.block = block
    model.forward = lambda input_ids, use_cache: block()
    stage = Stage("block", block)
    with Lanes(model, [stage], [tiny.ids(2, 5)], CPU, lambda stage: CPU) as lanes:
        (group,) = collected(lanes, 0, sites_of(stage), Gram)
    expected = x.mT.reshape(-1, 4)
    assert proportional(matrix(group.statistic), expected.T @ expected)
    assert group.tokens == 10
