"""What is remembered of a site's calibration inputs: column norms (Wanda), means too (DSnoT), or the Gram (SparseGPT).

Shape suffixes: T tokens, I inputs, O outputs. Sums are fp32 whatever the dtype of the inputs.
"""

from llmprune.statistics.columns import ColumnMoments, ColumnNorm
from llmprune.statistics.cross import CrossGram, DenseTarget
from llmprune.statistics.factor import Factor, FactorKind, factorize
from llmprune.statistics.gradient import Gradient
from llmprune.statistics.gram import Gram, Tile

__all__ = [
    "ColumnMoments", "ColumnNorm", "CrossGram", "DenseTarget", "Factor", "FactorKind", "Gradient", "Gram", "Tile",
    "factorize",
]  # fmt: skip
