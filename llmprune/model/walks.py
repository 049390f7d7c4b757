"""All lanes' runs of one stage side by side, held before every site until it is pruned.

So each site runs once, with its pruned weights, and what a site is fed has passed through the earlier ones pruned
(the true-sequential order), at the cost of one forward of the stage and of the activations of all lanes in memory.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from llmprune.errors import UnsupportedModelError
from llmprune.model.lanes import Lanes
from llmprune.model.observe import first_argument
from llmprune.model.sites import Site


class _Held(NamedTuple):
    """A walk waits before a site with this input."""

    site: Site
    x: Tensor


class Walks:
    """Context manager: `stops` leads all lanes through the stage; leaving it ends what is still on its way.

    Args:
        lanes: they wait at the stage.
        index: of the stage.
        sites: modules of the stage before which lanes are held.
        weights_of: within this context the weights are those that a lane is to run with.
    """

    def __init__(
        self,
        lanes: Lanes,
        index: int,
        sites: Sequence[Site],
        weights_of: Callable[[int], AbstractContextManager[None]] = lambda lane: nullcontext(),
    ) -> None:
        self._lanes, self._index, self._sites, self._weights_of = lanes, index, sites, weights_of
        self._hooks = ExitStack()
        self._walks: list[greenlet] = []
        self._outputs: dict[int, Any] = {}

    def __enter__(self) -> "Walks":
        coordinator = getcurrent()

        def hook_for(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
            def hold(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                coordinator.switch(_Held(site, first_argument(args, kwargs)))

            return hold

        for site in self._sites:
            handle = site.module.register_forward_pre_hook(hook_for(site), with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for walk in self._walks:
            if not walk.dead:
                walk.throw(GreenletExit)
        self._hooks.close()

    def stops(self) -> Iterator[tuple[Site, list[Tensor]]]:
        """Yield each site that the lanes come to, and what each lane is about to feed it; then go on.

        At the end the lanes have the stage's output, and `Lanes.advance` need not run it again.

        Raises:
            UnsupportedModelError: the lanes come to different sites.
        """
        for lane in self._lanes.waiting_at(self._index):
            walk = greenlet(partial(self._lanes.walk, self._index, lane))
            walk.gr_context = contextvars.copy_context()
            self._walks.append(walk)
        held = self._resume()
        while held:
            if len(held) < len(self._walks) or len({stop.site for stop in held}) > 1:
                raise UnsupportedModelError(
                    f"{held[0].site.name}: not all sequences pass through it in the same order; "
                    "leave out --true-sequential"
                )
            yield held[0].site, [stop.x.detach() for stop in held]
            held = self._resume()
        self._lanes.provide(self._outputs)

    def _resume(self) -> list[_Held]:
        """Let every walk go on to its next site or to its end; return those that are held."""
        held = []
        for lane, walk in zip(self._lanes.waiting_at(self._index), self._walks, strict=True):
            with self._weights_of(lane), self._lanes.forward_precision(self._index):
                reached = None if walk.dead else walk.switch()
            if isinstance(reached, _Held):
                held.append(reached)
            elif walk.dead and lane not in self._outputs:
                self._outputs[lane] = reached
        return held
