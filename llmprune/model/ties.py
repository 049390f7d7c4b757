"""Parameters that are one tensor under several names, and under which of them a checkpoint stores it."""

from collections import defaultdict
from collections.abc import Callable, Iterable

from torch import nn


class Ties:
    """The tied parameters of a model.

    Args:
        tied: the source of each tied parameter, as `all_tied_weights_keys` of a transformers model tells.
        stored: the parameters that the checkpoint has a tensor for.
    """

    def __init__(self, tied: dict[str, str], stored: Iterable[str]) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        for target, source in tied.items():
            groups[source].append(target)
        self._groups = {name: (source, *rest) for source, rest in groups.items() for name in (source, *rest)}
        self._stored = set(stored)

    def names(self, parameter: str) -> tuple[str, ...]:
        """Return all names of a parameter's tensor."""
        return self._groups.get(parameter, (parameter,))

    def stored_name(self, parameter: str) -> str:
        """Return the name under which the checkpoint stores a parameter; its own where it does so."""
        names = (parameter, *self.names(parameter))
        return next((name for name in names if name in self._stored), parameter)

    def is_lent(self, parameter: str) -> bool:
        """Say whether the parameter's tensor also goes by a name under which the checkpoint does not store it."""
        return not self._stored.issuperset(self.names(parameter)) and parameter in self._groups

    def link(self, model: nn.Module, parameters: Iterable[str]) -> None:
        """Let those of the named parameters that hold no data be the tensor of a namesake that does."""
        for name in parameters:
            if model.get_parameter(name).is_meta:
                namesakes = (model.get_parameter(namesake) for namesake in self.names(name))
                loaded = next((parameter for parameter in namesakes if not parameter.is_meta), None)
                if loaded is not None:
                    path, _, own = name.rpartition(".")
                    model.get_submodule(path)._parameters[own] = loaded


def untied(tied: dict[str, str], stored: Iterable[str], same: Callable[[str, str], bool]) -> list[str]:
    """Return the parameters that a checkpoint unties: it stores them and their source, with different contents."""
    known = set(stored)
    both = [(target, source) for target, source in tied.items() if target in known and source in known]
    return [target for target, source in both if not same(target, source)]
