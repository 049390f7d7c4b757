"""See what sites are multiplied with, without knowing the module that does it.

Two ways, as neither sees everything. A hook on a module sees its input whatever kernel computes it. Where weights are
used without calling their module, or many in one parameter, the multiplication itself is watched, and the weight
known by its address.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.model.experts import one_by_one
from llmprune.model.sites import Site, Stage

See = Callable[[Site, Tensor], None]
SeeGradient = Callable[[Site, Tensor, Tensor], None]

_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_SUMS_WITH_PRODUCTS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}


@contextmanager
def observing(stage: Stage, sites: Sequence[Site], see: See, see_gradient: SeeGradient | None = None) -> Iterator[None]:
    """During one forward of `stage`, call `see(site, x)` with each input [..., inputs] that a site is given.

    In a backward through what this forward has computed, `see_gradient(site, x, g)` is called with the gradient
    [..., outputs] of what the site has made of x, when that is known.
    """
    hooked: set[Site] = set()

    def hook_for(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hooked.add(site)
            see(site, first_argument(args, kwargs).detach())

        return hook

    def output_hook_for(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            x = first_argument(args, kwargs).detach()
            if y.requires_grad and see_gradient is not None:
                y.register_hook(lambda g: see_gradient(site, x, g))

        return hook

    def see_unhooked(site: Site, x: Tensor) -> None:
        if site not in hooked:
            see(site, x.detach())

    def see_gradient_unhooked(site: Site, x: Tensor, g: Tensor) -> None:
        if site not in hooked and see_gradient is not None:
            see_gradient(site, x, g)

    with ExitStack() as stack:
        for site in sites:
            if site.expert is None:
                handle = site.module.register_forward_pre_hook(hook_for(site), with_kwargs=True)
                stack.callback(handle.remove)
                if see_gradient is not None:
                    handle = site.module.register_forward_hook(output_hook_for(site), with_kwargs=True)
                    stack.callback(handle.remove)
        stack.enter_context(one_by_one(stage.module))
        stack.enter_context(_WeightsInUse(sites, see_unhooked, see_gradient_unhooked if see_gradient else None))
        yield


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a module that multiplies by a weight is given, whether by position or by name."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


_Place = Callable[[Tensor], Tensor]
_Product = tuple[Tensor, Tensor, _Place]


def _products(func: Any, operands: Sequence[Any]) -> Iterator[_Product]:
    """Yield what may be a weight, what it would be multiplied with, and how the result is to be turned to match."""
    if func is nn.functional.linear:
        yield operands[1], operands[0], _as_it_is
        return
    first = 0 if func in _PRODUCTS else 1 if func in _SUMS_WITH_PRODUCTS else None
    if first is not None:
        left, right = operands[first : first + 2]
        yield right, left, _as_it_is
        if left.ndim >= 2 and right.ndim >= 2:
            yield left, right.mT, _turned  # a weight times columns of inputs


def _as_it_is(result: Tensor) -> Tensor:
    return result


def _turned(result: Tensor) -> Tensor:
    return result.mT


def _part(place: _Place, index: int, own: Tensor, result: Tensor) -> Tensor:
    part: Tensor = place(result)[index][own]
    return part


class _WeightsInUse(TorchFunctionMode):
    """Watches matrix products for the weights of sites."""

    def __init__(self, sites: Sequence[Site], see: See, see_gradient: SeeGradient | None) -> None:
        super().__init__()
        self._see, self._see_gradient = see, see_gradient
        weights = {site: site.module.get_parameter(site.parameter) for site in sites}
        self._at = {site.view(weight.data).data_ptr(): site for site, weight in weights.items() if not weight.is_meta}
        self._away = [site for site, weight in weights.items() if weight.is_meta]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        products = list(_products(func, (*args, *kwargs.values())))
        seen = [(site, x, place) for product in products for site, x, place in self._sites_in(product)]
        for site, x, _ in seen:
            self._see(site, x)
        result = func(*args, **kwargs)
        if self._see_gradient is not None and seen and result.requires_grad:
            result.register_hook(partial(self._pass_on, seen))
        return result

    def _pass_on(self, seen: Sequence[tuple[Site, Tensor, _Place]], gradient: Tensor) -> None:
        for site, x, place in seen:
            assert self._see_gradient is not None
            self._see_gradient(site, x.detach(), place(gradient))

    def _sites_in(self, product: _Product) -> Iterator[tuple[Site, Tensor, _Place]]:
        """Yield the sites that take part in a product, what they are given, and where in its result their part is."""
        weight, x, place = product
        if weight.ndim == 3 and x.ndim == 3 and len(weight) == len(x):
            for index, (matrix, rows) in enumerate(zip(weight, x, strict=True)):
                if site := self._site(matrix):
                    own = rows.any(-1)  # tokens of other experts come as rows of zeros
                    yield site, rows[own], partial(_part, place, index, own)
        elif weight.ndim == 2 and (site := self._site(weight)):
            yield site, x, place

    def _site(self, weight: Tensor) -> Site | None:
        site = self._at.get(weight.data_ptr()) or self._fetched(weight)
        return site if site and weight.numel() == site.numel else None

    def _fetched(self, weight: Tensor) -> Site | None:
        """Return the site whose weight this is, among those that accelerate fetches only for their module's forward."""
        for site in self._away:
            parameter = site.module.get_parameter(site.parameter)
            if not parameter.is_meta and site.view(parameter.data).data_ptr() == weight.data_ptr():
                return site
        return None
