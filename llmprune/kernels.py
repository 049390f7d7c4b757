"""The gate to `llmprune_kernels`: the one place that decides which implementation of an op runs.

`obs_masked` and `obs_nm` round as the paper's code does; `prune_masked` and `prune_nm` are free in how they sum.
"""

from llmprune_kernels.obs.recursive import prune_masked, prune_nm
from llmprune_kernels.obs.reference import obs_masked, obs_nm

__all__ = ["obs_masked", "obs_nm", "prune_masked", "prune_nm"]
