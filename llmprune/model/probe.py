"""Try out one block of each kind on a few tokens: which sites share an input, what a forward needs and how long it takes.

Blocks are of one kind when they are of one class, with parameters of the same shapes and the same sites. The weights
may be zeros: what is measured does not depend on them. Where they choose the experts, all tokens choose the same.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmprune.model.collect import Collector
from llmprune.model.experts import one_by_one
from llmprune.model.groups import Group, StatisticType, first_lane
from llmprune.model.lanes import Lanes
from llmprune.model.live import LiveBytes, bytes_of
from llmprune.model.observe import observing
from llmprune.model.outline import Outline
from llmprune.model.sites import Site, Stage
from llmprune.statistics import CrossGram, Gram

_SHORT = 8  # tokens of the first of two sequences
_LONG = (16, 64)  # least and most tokens of the second
_LONG_ROUNDED = 512  # the most where weights are rounded in each forward, which must not be most of it
_LONG_FLOPS = 1e11  # about what the second may cost
_REPEATS = 3

# Torch's own table lacks the first, and torch 2.11's knows no attention with fewer heads of keys than of queries.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


@dataclass(frozen=True)
class Trial:
    """What a block of one kind needs.

    Attributes:
        groups: the sites that share an input, in reading order.
        fed: the share of the tokens that each group is fed: below 1 for experts.
        flops: of a forward of one sequence: per token, and per token squared (attention).
        seconds_per_flop: of a forward.
        plain_seconds_per_flop: of a forward without autocast, in the dtype of the weights.
        forward_bytes: the most that the activations of a forward take, per token.
        rounded_bytes: what it takes whatever the tokens: the copy of a weight in the dtype that autocast multiplies in.
        input_bytes: what the inputs of all groups take, per token.
        statistics_bytes: the most that the statistics of all groups take at once.
        runs: in how many runs the statistics are summed.
        held_bytes: the most that the activations of a forward which is held before a site take, per token.
        side_by_side: whether all lanes are held before each site.
    """

    groups: list[Group]
    fed: list[float]
    flops: tuple[float, float]
    seconds_per_flop: float
    forward_bytes: float
    input_bytes: float
    statistics_bytes: int
    runs: int
    held_bytes: float = 0.0
    side_by_side: bool = False
    plain_seconds_per_flop: float = 0.0
    rounded_bytes: float = 0.0

    def forward_flops(self, length: int) -> float:
        """Return the floating point operations of a forward of one sequence."""
        return self.flops[0] * length + self.flops[1] * length**2

    def forward_memory(self, tokens: int) -> float:
        """Return the bytes that a forward of so many tokens takes."""
        return self.forward_bytes * tokens + self.rounded_bytes


Kind = tuple[Any, ...]


def block_kind(stage: Stage, sites: Sequence[Site]) -> Kind:
    """Return what blocks of one kind have in common: their class, their parameters, and their sites to prune."""
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in stage.module.named_parameters())
    return type(stage.module), shapes, tuple(site.name.removeprefix(stage.name) for site in sites)


def try_blocks(
    host: Outline,
    sites: Mapping[str, Sequence[Site]],
    needs: StatisticType,
    budget: int,
    true_sequential: bool,
    home: torch.device,
    longest: int,
    side_by_side: bool = False,
    autocast: torch.dtype | None = None,
    at_once: int = 1,
) -> dict[str, Trial]:
    """Return the trial of each block, by its name, on sequences of at most `longest` tokens.

    `sites` are the blocks' sites to prune, by the blocks' names. With `autocast` weights are rounded in each forward,
    of `at_once` tokens. For the other arguments see `Collector`, and `Lanes`.

    Raises:
        UnsupportedModelError: the model's forward cannot be led block by block.
    """
    kinds = {block.name: block_kind(block, sites.get(block.name, [])) for block in host.blocks}
    trials: dict[Kind, Trial] = {}
    long = min(_long(host, _LONG_ROUNDED if autocast else _LONG[1]), longest)
    lengths = min(_SHORT, long // 2), long
    batches = [_ids(length) for length in lengths]
    with Lanes(host.model, host.blocks, batches, home, host.device_of, autocast) as lanes:
        collector = Collector(lanes, needs, budget, true_sequential, side_by_side)
        for index, block in enumerate(host.blocks):
            host.load(block)
            if kinds[block.name] not in trials:
                trials[kinds[block.name]] = _try(
                    collector, index, sites.get(block.name, []), lengths, at_once if autocast else None
                )
            complete = trials.keys() >= set(kinds.values())
            if not complete:
                lanes.advance(index)
            host.free(block)
            if complete:
                break
    return {name: trials[kind] for name, kind in kinds.items()}


def try_head(host: Outline, sites: Sequence[Site], needs: StatisticType, like: Trial) -> Trial:
    """Return what an output head needs that is to be pruned, as its one matrix tells; `like` is a block's trial."""
    (outputs, inputs), size = sites[0].shape, host.dtype.itemsize
    return Trial(
        groups=[Group(list(sites), calls=1)],
        fed=[1.0],
        flops=(2.0 * outputs * inputs, 0.0),
        seconds_per_flop=like.seconds_per_flop,
        forward_bytes=outputs * size,
        input_bytes=inputs * size,
        statistics_bytes=without_dense(needs).nbytes(inputs),
        runs=1,
        plain_seconds_per_flop=like.plain_seconds_per_flop,
    )


def waiting_bytes(host: Outline, sequences: int, length: int, home: torch.device) -> int:
    """Return what a batch keeps in memory while it waits at the first block: hidden states, masks, rotary tables."""
    live = LiveBytes()
    with live, Lanes(host.model, host.blocks, [_ids(length, sequences)], home, host.device_of):
        waiting = live.now
    return waiting + int(_growth(host, home) * sequences * length)


def _growth(host: Outline, home: torch.device) -> float:
    """Return what waiting takes more per token once the first block is behind: many models hold on to its input."""
    if len(host.blocks) == 1:
        return 0.0
    host.load(host.blocks[0])
    live = LiveBytes()
    with live, Lanes(host.model, host.blocks, [_ids(2)], home, host.device_of) as lanes:
        before = live.now
        lanes.advance(0)
        growth = (live.now - before) / 2
    host.free(host.blocks[0])
    return growth


def _long(host: Outline, most: int) -> int:
    largest = max(sum(p.numel() for p in block.module.parameters()) for block in host.blocks)
    return int(min(max(_LONG[0], _LONG_FLOPS / (2 * largest)), most))


def _ids(length: int, sequences: int = 1) -> Tensor:
    return torch.zeros(sequences, length, dtype=torch.int64)


def _try(
    collector: Collector, index: int, sites: Sequence[Site], lengths: tuple[int, int], rounded_for: int | None
) -> Trial:
    """Try a block; `rounded_for` are the tokens for which its weights are rounded, if they are."""
    lanes = collector.lanes
    groups, seen = first_lane(lanes, index, sites)
    groups, inputs = _as_fellows(groups), seen or {}
    fed = [sum(x.numel() for x in inputs.get(group.sites[0], ())) / group.inputs / lengths[0] for group in groups]
    input_bytes = bytes_of(list(inputs.values())) / lengths[0]
    inputs.clear()
    with one_by_one(lanes.stage(index).module):
        flops = [_flops(lanes, index, lane) for lane in (0, 1)]
        peaks, held = zip(*(_forward_bytes(lanes, index, lane, sites) for lane in (0, 1)), strict=True)
        plain = _seconds(partial(lanes.walk, index, 1)) / max(flops[1], 1)
        times = [_seconds(partial(lanes.run, index, lane)) for lane in (0, 1) if rounded_for]
    statistics_bytes, runs = collector.demand(groups)
    side_by_side = bool(sites) and collector.holds(sites)
    if not side_by_side:
        statistics_bytes //= collector.needs.nbytes(1) // without_dense(collector.needs).nbytes(1)
    per_token, rounded = _line(lengths, peaks) if rounded_for else (peaks[1] / lengths[1], 0.0)
    each = flops[1] / lengths[1]
    return Trial(
        groups=groups,
        fed=fed,
        flops=_parabola(lengths, flops),
        seconds_per_flop=_per_flop(flops, times, rounded_for * each) if rounded_for else plain,
        forward_bytes=per_token,
        input_bytes=input_bytes,
        statistics_bytes=statistics_bytes,
        runs=runs,
        held_bytes=held[1] / lengths[1],
        side_by_side=side_by_side,
        plain_seconds_per_flop=plain,
        rounded_bytes=rounded,
    )


def without_dense(needs: StatisticType) -> StatisticType:
    """Return the statistic of stages that see no inputs of the dense model: those with experts, and the head."""
    return Gram if needs is CrossGram else needs


def _forward_bytes(lanes: Lanes, index: int, lane: int, sites: Sequence[Site]) -> tuple[int, int]:
    """Return the most bytes that a lane's activations take, and the most before a site."""
    live, held = LiveBytes(), [0]

    def see(site: Site, x: Tensor) -> None:
        held.append(live.now)

    with live, observing(lanes.stage(index), sites, see):
        lanes.run(index, lane)
    return live.peak, max(held)


def _as_fellows(groups: Sequence[Group]) -> list[Group]:
    """Let experts that no token reached share inputs as their fellows do that some tokens reached."""
    shared = {site.family: group.family for group in groups if group.calls is not None for site in group.sites}
    joined: dict[Any, Group] = {}
    for group in groups:
        site = group.sites[0]
        expert = site.expert if site.expert is not None else site.tensor.rsplit(".", 2)[0]
        unreached = group.calls is None and group.of_expert
        key = (expert, shared.get(site.family, site.family)) if unreached else id(group)
        joined.setdefault(key, Group([], group.calls)).sites.extend(group.sites)
    return list(joined.values())


def _flops(lanes: Lanes, index: int, lane: int) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_ATTENTION, _attention_flops))
    with counter:
        lanes.run(index, lane)
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **options: Any) -> int:
    """Return the operations of the two products of attention, given the shapes [batch, heads, length, width]."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _parabola(lengths: tuple[int, int], counts: Sequence[float]) -> tuple[float, float]:
    """Return a and b for which a · length + b · length² gives both counts; b is not negative."""
    (short, long), (low, high) = lengths, counts
    square = max(0.0, (high / long - low / short) / (long - short))
    return high / long - square * long, square


def _line(places: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the line through two points, and its value at 0, neither of them negative."""
    slope = max(0.0, (values[1] - values[0]) / (places[1] - places[0]))
    return slope, max(0.0, values[0] - slope * places[0])


def _per_flop(flops: Sequence[int], seconds: Sequence[float], wanted: float) -> float:
    """Return the seconds per operation of a forward of `wanted` ones, from two forwards that take so much and more."""
    slope, once = _line(flops, seconds)
    return slope + once / max(wanted, 1)


def _seconds(forward: Callable[[], object]) -> float:
    return least_seconds(lambda: forward)


def least_seconds(set_up: Callable[[], Callable[[], object]]) -> float:
    """Return the least time of a few calls, each of what `set_up` has made ready."""
    times = []
    for _ in range(_REPEATS):
        call = set_up()
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
