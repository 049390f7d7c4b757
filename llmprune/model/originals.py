"""The dense weights of a stage, kept while it is pruned, so that the model as it was can run beside the pruned one."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from llmprune.errors import UnsupportedModelError
from llmprune.model.sites import Site


def require_in_memory(sites: Sequence[Site]) -> None:
    """Raise UnsupportedModelError for a parameter that accelerate offloads: it cannot be exchanged for a copy."""
    for site in sites:
        if site.module.get_parameter(site.parameter).is_meta:
            raise UnsupportedModelError(
                f"{site.tensor} is offloaded by accelerate, and a run beside the dense model needs it in memory: give the "
                "checkpoint's folder or Hub id instead, or dense_target=0, tune_epochs=0"
            )


class Originals:
    """Copies of the parameters that hold some sites, made before these are pruned."""

    def __init__(self, sites: Sequence[Site]) -> None:
        parameters = {site.tensor: site.module.get_parameter(site.parameter) for site in sites}
        self._kept = [(parameter, parameter.data.clone()) for parameter in parameters.values()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules compute with the dense weights inside the block."""
        pruned = [parameter.data for parameter, _ in self._kept]
        for parameter, dense in self._kept:
            parameter.data = dense
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._kept, pruned, strict=True):
                parameter.data = data


class Backup:
    """Copies of weights, in the host's memory, with which their stage can be pruned anew."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._kept = [(weight, weight.to("cpu", copy=True)) for weight in weights]

    def restore(self) -> None:
        """Let the weights be what they were."""
        for weight, dense in self._kept:
            weight.copy_(dense)
