"""Lanes: every calibration batch runs the model's own forward, suspended at each block.

Capturing the first block's arguments and reusing them for all blocks is silently wrong wherever blocks differ
(sliding and full attention, per-layer inputs, shared keys). A lane instead is a greenlet inside the model's forward:
it parks at a block, the coordinator runs that block for all lanes when the block is loaded, and hands each lane its
output. Masks, rotary tables and residual streams are the model's own, so no architecture needs code here.

Greenlets rather than threads: they share one OS thread, so gradient mode, the current device and OpenMP's pool are
the same everywhere, and an error in a lane surfaces in the coordinator by itself.
"""

import contextvars
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply, send_to_device
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from torch.func import functional_call

from llmprune.checkpoint.pinned import on_host
from llmprune.errors import UnsupportedModelError
from llmprune.model.precision import multiplying_in
from llmprune.model.sites import Stage


class Arrival(NamedTuple):
    """A lane waits at a stage with these arguments for the stage's forward."""

    stage: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Lanes:
    """Context manager: one suspended forward per batch, all waiting at the same stage.

    Args:
        model: its forward is run once per batch, piecewise.
        stages: where lanes park, in the order of the forward.
        batches: token ids [sequences, length] each.
        home: device of what lies between the stages (embedding, masks), where hidden states wait.
        device_of: device of a stage's weights.
        autocast: the dtype that the forward multiplies in, where that is not the weights' own.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        batches: Sequence[Tensor],
        home: torch.device,
        device_of: Callable[[Stage], torch.device],
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model, self._stages, self._batches = model, stages, batches
        self.home, self.device_of, self._autocast = home, device_of, autocast
        self._passing: set[greenlet] = set()  # those that run a stage, and are not to park there
        self._arrivals: list[Arrival | None] = []
        self._provided: dict[int, Any] = {}  # by lane, outputs of the stage at which it waits that are known already
        self._results: list[Any] = []
        self._lanes: list[greenlet] = []
        self._restore: list[Callable[[], None]] = []
        self._training = [module for module in model.modules() if module.training]
        self._modes = ExitStack()

    def __enter__(self) -> "Lanes":
        self._modes.enter_context(torch.inference_mode(False))  # inputs' versions tell which sites share one
        self._modes.enter_context(torch.no_grad())
        self._modes.enter_context(torch.autocast(self.home.type, enabled=False))
        self._coordinator = getcurrent()
        self._model.eval()  # no dropout
        for index, stage in enumerate(self._stages):
            self._restore.append(_replace_forward(stage.module, self._parking(index, stage.module.forward)))
        try:
            for batch in self._batches:
                self._start(batch)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def __len__(self) -> int:
        return len(self._lanes)

    def stage(self, index: int) -> Stage:
        """Return the stage at which lanes park `index`-th."""
        return self._stages[index]

    def batch(self, lane: int) -> Tensor:
        """Return a lane's token ids [sequences, length]."""
        return self._batches[lane]

    def device(self, index: int) -> torch.device:
        """Return the device of the weights of stage `index`."""
        return self.device_of(self._stages[index])

    def sequences(self, lane: int) -> int:
        """Return the number of sequences in a lane's batch."""
        return len(self._batches[lane])

    def waiting_at(self, index: int) -> list[int]:
        """Return the lanes that wait at stage `index`; the model's forward may lead some past it."""
        return [lane for lane, arrival in enumerate(self._arrivals) if arrival is not None and arrival.stage == index]

    def provide(self, outputs: dict[int, Any]) -> None:
        """Take the outputs of the stage for some lanes: `advance` uses them instead of running it."""
        self._provided |= outputs

    def retract(self, lanes: Iterable[int]) -> None:
        """Forget such outputs, as the weights have changed since."""
        for lane in lanes:
            self._provided.pop(lane, None)

    def forward_precision(self, index: int | None = None) -> AbstractContextManager[None]:
        """Return the context in which a lane is switched to, with autocast on if it is asked for.

        Autocast is a state of the thread, which all greenlets share. So the coordinator turns it on around every switch:
        a forward that did so itself would leave it on for the coordinator when it parks.

        Args:
            index: of the stage that the lane is about to run; None for what lies between stages.
        """
        if self._autocast is None:
            return nullcontext()
        device = self.home if index is None else self.device_of(self._stages[index])
        return multiplying_in(self._autocast, device)

    def as_multiplied(self, x: Tensor) -> Tensor:
        """Return what a site is fed in the precision in which the forward multiplies it."""
        return x if self._autocast is None else x.to(self._autocast)

    def provided(self, lane: int) -> Any:
        """Return the output that the lane was given for the stage at which it waits."""
        return self._provided[lane]

    def is_provided(self, lane: int) -> bool:
        """Say whether the lane was given an output for the stage at which it waits."""
        return lane in self._provided

    def run_ahead(self, index: int, lane: int) -> None:
        """As `run`, and provide the output, if the lane waits there."""
        if lane in self.waiting_at(index):
            self._provided[lane] = self.run(index, lane)

    def output(self, index: int, lane: int) -> Any:
        """Return the output of stage `index`, at which the lane waits; run it if none was provided."""
        return self._provided.pop(lane) if self.is_provided(lane) else self.run(index, lane)

    def run(self, index: int, lane: int, weights: dict[str, Tensor] | None = None) -> Any:
        """Run stage `index` on what the lane waits there with, and return its output; the lane stays where it is.

        `weights`, by their names in the stage, take the place of its own; gradients flow to them where they are wanted.

        A lane that the model's forward has led past the stage, as past cross-attention without an image, runs nothing.
        """
        with self.forward_precision(index):
            return self.walk(index, lane, weights)

    def walk(self, index: int, lane: int, weights: dict[str, Tensor] | None = None) -> Any:
        """As `run`, for a greenlet of its own that is switched into within `forward_precision`."""
        arrival = self._arrivals[lane]
        return self.replay(arrival, weights) if arrival is not None and arrival.stage == index else None

    def arrival(self, lane: int) -> Arrival | None:
        """Return what the lane waits with, and where; None for one that has reached its end."""
        return self._arrivals[lane]

    def replay(self, arrival: Arrival, weights: dict[str, Tensor] | None = None) -> Any:
        """Run a stage on these arguments and return its output; lanes stay where they are. See `run` for `weights`."""
        args, kwargs, stage = arrival.args, arrival.kwargs, self._stages[arrival.stage]
        device = self.device_of(stage)
        if device != self.home:  # sending rebuilds dictionaries, in which some models hand keys from block to block
            args, kwargs = send_to_device((args, kwargs), device)
        self._passing.add(getcurrent())
        try:
            module = stage.module
            return functional_call(module, weights, args, kwargs) if weights else module(*args, **kwargs)
        finally:
            self._passing.discard(getcurrent())

    def advance(self, index: int, at_most: int | None = None) -> None:
        """Run stage `index` for every lane that waits there, and let it go on to a later one or to its end.

        Args:
            index: of the stage.
            at_most: how many lanes, if not all.

        Raises:
            UnsupportedModelError: a lane goes back.
        """
        for lane in self.waiting_at(index)[:at_most]:
            self.step(index, lane)

    def step(self, index: int, lane: int) -> Any:
        """As `advance`, for one lane that waits there; return the stage's output as the lane was given it."""
        output = self._send_home(self.output(index, lane))
        self._arrivals[lane] = None
        self._arrivals[lane] = self._onward(self._resume(lane, output), index)
        return output

    def outputs(self) -> list[Any]:
        """Return what the model's forward returned for each batch, once all stages are behind."""
        return self._results

    def _send_home(self, output: Any) -> Any:
        """Move a stage's output to where lanes wait; from a GPU to the host through pinned memory."""
        if self.home.type == "cpu":
            return recursively_apply(on_host, output)
        return send_to_device(output, self.home)

    def _start(self, batch: Tensor) -> None:
        ids = batch.to(self.home)
        lane = greenlet(lambda: self._model(input_ids=ids, use_cache=False))
        lane.gr_context = contextvars.copy_context()
        self._lanes.append(lane)
        self._arrivals.append(None)
        try:
            self._arrivals[-1] = self._resume(len(self._lanes) - 1)
        except (TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} does not run on token ids alone: {error}"
            ) from error
        if self._arrivals[-1] is None:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} never runs {self._stages[0].name} nor any later block"
            )

    def _resume(self, lane: int, *output: Any) -> Arrival | None:
        with self.forward_precision():
            reached = self._lanes[lane].switch(*output)
        if isinstance(reached, Arrival):
            return reached
        self._results.append(reached)
        return None

    def _onward(self, arrival: Arrival | None, index: int) -> Arrival | None:
        if arrival is not None and arrival.stage <= index:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} goes from {self._stages[index].name} back to "
                f"{self._stages[arrival.stage].name}: llmprune prunes blocks that are visited once each and in order"
            )
        return arrival

    def _parking(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward for stage `index` that parks the lane which calls it; the coordinator runs the real one."""

        def park(*args: Any, **kwargs: Any) -> Any:
            if getcurrent() in self._passing:
                return forward(*args, **kwargs)
            return self._coordinator.switch(Arrival(index, args, kwargs))

        return park

    def _release(self) -> None:
        """End every suspended forward and give the stages their own forward back."""
        for lane in self._lanes:
            if not lane.dead:
                lane.throw(GreenletExit)
        for restore in self._restore:
            restore()
        for module in self._training:
            module.training = True
        self._arrivals.clear()
        self._provided.clear()
        self._modes.close()


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Shadow a module's forward on the instance and return what undoes it (accelerate shadows it too)."""
    had, previous = "forward" in vars(module), module.forward
    module.forward = forward

    def restore() -> None:
        if had:
            module.forward = previous
        else:
            del module.forward

    return restore
