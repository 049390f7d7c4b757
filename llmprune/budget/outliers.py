"""OWL (Yin et al., ICML 2024, arXiv:2310.05175): a block keeps the more weights, the more outliers it has.

An outlier is a |w|·‖x‖ above five times the mean over all sites of the block (section 3.2; M of the paper). The share
of outliers is scaled to a range of densities, with λ half of the range that is allowed.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from llmprune.model.groups import Group
from llmprune.model.sites import Site
from llmprune.statistics import Gram

_TIMES_THE_MEAN = 5.0


def outlier_share(groups: Iterable[Group], weight: Callable[[Site], Tensor]) -> float:
    """Return the share of outliers in a block; 0 where no input reaches it."""
    norms: dict[Site, Tensor] = {}
    for group in groups:
        if isinstance(group.statistic, Gram):
            norms |= dict.fromkeys(group.sites, group.statistic.norm_I)
            group.statistic = None
    total, count = 0.0, 0
    for site, norm_I in norms.items():
        score_OI = weight(site).to(norm_I.device).float().abs() * norm_I
        total, count = total + float(score_OI.sum(dtype=torch.float64)), count + score_OI.numel()
    bound = _TIMES_THE_MEAN * total / max(count, 1)
    above = sum(
        int((weight(site).to(norm_I.device).float().abs() * norm_I > bound).sum()) for site, norm_I in norms.items()
    )
    return above / max(count, 1)


def block_shares(
    outliers: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, span: float
) -> dict[str, float]:
    """Return the sparsity of each block; weighted by size their mean is `sparsity`, and none is further than `span`."""
    least, most = min(outliers.values()), max(outliers.values())
    density = {name: span * (share - least) / max(most - least, 1e-30) for name, share in outliers.items()}
    mean = sum(density[name] * sizes[name] for name in density) / sum(sizes[name] for name in density)
    return {name: sparsity + mean - density[name] for name in density}
