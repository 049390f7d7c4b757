"""Sites of a run by block and by kind."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from llmprune.allocation import kind_of

Site = dict[str, Any]

_BLOCK = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.|\[(\d+)\]$")  # a module of its own, or a part of a stack of experts


def block_of(site: Site) -> int | None:
    """Return the number of the site's block; None outside of the blocks, as for the output head."""
    found = _BLOCK.search(site["name"])
    return int(found[1]) if found else None


def expert_of(site: Site) -> int | None:
    """Return the number of the expert that the site belongs to, None for other sites."""
    found = _EXPERT.search(site["name"])
    return int(found[1] or found[2]) if found else None


def weights_in(site: Site) -> int:
    """Return the weights of a site."""
    return int(site["shape"][0]) * int(site["shape"][1])


def by_kind(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """Return the sites within blocks, by kind in the order of the model."""
    found: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        if block_of(site) is not None:
            found[kind_of(site["name"])].append(site)
    return dict(found)


def by_block(sites: Iterable[Site]) -> dict[int, list[Site]]:
    """Return the sites of every block, by its number."""
    found: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        block = block_of(site)
        if block is not None:
            found[block].append(site)
    return dict(sorted(found.items()))


def sparsity_of(sites: Iterable[Site]) -> float:
    """Return the share of zeros in the sites together."""
    sites = list(sites)
    return float(sum(site["zeros"] for site in sites) / max(sum(map(weights_in, sites)), 1))


def mean_error(sites: Iterable[Site]) -> float:
    """Return the mean of the sites' relative output errors."""
    errors = [site["error"] for site in sites]
    return float(sum(errors) / max(len(errors), 1))


def norms_of(sites: Iterable[Site]) -> str:
    """Return what the sites' output errors were measured with, in words."""
    return ", ".join(sorted({str(site["error_norm"]) for site in sites})).replace("_", " ")


def share_of_magnitude(site: Site) -> float | None:
    """Return the site's error over that of magnitude pruning; None where that one is zero or was not measured."""
    yardstick = site.get("magnitude_error")
    return float(site["error"]) / yardstick if yardstick else None


def mean_share(sites: Iterable[Site]) -> float | None:
    """Return the mean of the sites' errors over those of magnitude pruning, None where there is none."""
    shares = [share for site in sites if (share := share_of_magnitude(site)) is not None]
    return float(sum(shares) / len(shares)) if shares else None


def title_of(run: dict[str, Any]) -> str:
    """Return a run's method and pattern."""
    return f"{run['recipe']['method']} {run['recipe']['pattern']}"
