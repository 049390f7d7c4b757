"""How much of a budget each site gets: one threshold over all weights, or shares that cost least by measured curves."""

from llmprune.allocation.magnitude import global_magnitude
from llmprune.allocation.measured import Measured, Part, kind_of
from llmprune.allocation.shares import Cost, Curve, bounds, pinned, split, wish

__all__ = ["Cost", "Curve", "Measured", "Part", "bounds", "global_magnitude", "kind_of", "pinned", "split", "wish"]
