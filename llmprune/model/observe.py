"""See what sites are multiplied with, without knowing the module that does it.

Two ways, as neither sees everything. A hook on a module sees its input whatever kernel computes it. Where weights are
used without calling their module, or many in one parameter, the multiplication itself is watched, and the weight
known by its address.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmprune.model.experts import one_by_one
from llmprune.model.sites import Site, Stage

See = Callable[[Site, Tensor], None]

_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_SUMS_WITH_PRODUCTS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}


@contextmanager
def observing(stage: Stage, sites: Sequence[Site], see: See) -> Iterator[None]:
    """During one forward of `stage`, call `see(site, x)` with each input [..., inputs] that a site is given."""
    hooked: set[Site] = set()

    def hook_for(site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hooked.add(site)
            x = args[0] if args else next(iter(kwargs.values()))
            see(site, x.detach())

        return hook

    def see_unhooked(site: Site, x: Tensor) -> None:
        if site not in hooked:
            see(site, x.detach())

    with ExitStack() as stack:
        for site in sites:
            if site.expert is None:
                handle = site.module.register_forward_pre_hook(hook_for(site), with_kwargs=True)
                stack.callback(handle.remove)
        stack.enter_context(one_by_one(stage.module))
        stack.enter_context(_WeightsInUse(sites, see_unhooked))
        yield


class _WeightsInUse(TorchFunctionMode):
    """Watches matrix products for the weights of sites."""

    def __init__(self, sites: Sequence[Site], see: See) -> None:
        super().__init__()
        self._see = see
        weights = {site: site.module.get_parameter(site.parameter) for site in sites}
        self._at = {site.view(weight.data).data_ptr(): site for site, weight in weights.items() if not weight.is_meta}
        self._away = [site for site, weight in weights.items() if weight.is_meta]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            x, weight = (*args, *kwargs.values())[:2]
            self._note(weight, x)
        elif func in _PRODUCTS:
            self._note_either(*(*args, *kwargs.values())[:2])
        elif func in _SUMS_WITH_PRODUCTS:
            self._note_either(*(*args, *kwargs.values())[1:3])
        return func(*args, **kwargs)

    def _note_either(self, left: Tensor, right: Tensor) -> None:
        self._note(right, left)
        if left.ndim >= 2 and right.ndim >= 2:
            self._note(left, right.mT)  # a weight times columns of inputs

    def _note(self, weight: Tensor, x: Tensor) -> None:
        if weight.ndim == 3 and x.ndim == 3 and len(weight) == len(x):
            for matrix, rows in zip(weight, x, strict=True):
                if site := self._site(matrix):
                    self._see(site, rows[rows.any(-1)])  # tokens of other experts come as rows of zeros
        elif weight.ndim == 2 and (site := self._site(weight)):
            self._see(site, x)

    def _site(self, weight: Tensor) -> Site | None:
        site = self._at.get(weight.data_ptr()) or self._fetched(weight)
        return site if site and weight.numel() == site.shape[0] * site.shape[1] else None

    def _fetched(self, weight: Tensor) -> Site | None:
        """Return the site whose weight this is, among those that accelerate fetches only for their module's forward."""
        for site in self._away:
            parameter = site.module.get_parameter(site.parameter)
            if not parameter.is_meta and site.view(parameter.data).data_ptr() == weight.data_ptr():
                return site
        return None
