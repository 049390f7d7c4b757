"""The gate to `llmprune_kernels`: the one place that decides which implementation of an op runs.

Only the readable references exist so far; they run on every device.
"""

from llmprune_kernels.obs.reference import obs_masked, obs_nm

__all__ = ["obs_masked", "obs_nm"]
