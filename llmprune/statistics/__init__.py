"""What is remembered of a site's calibration inputs: column norms (Wanda), means too (DSnoT), or the Gram (SparseGPT).

Shape suffixes: T tokens, I inputs, O outputs. Sums are fp32 whatever the dtype of the inputs.
"""

from llmprune.statistics.columns import ColumnMoments, ColumnNorm
from llmprune.statistics.cross import CrossGram, DenseTarget
from llmprune.statistics.factor import FactorKind
from llmprune.statistics.gradient import Gradient
from llmprune.statistics.gram import Gram, Tile
from llmprune.statistics.protocol import Statistic

__all__ = [
    "ColumnMoments", "ColumnNorm", "CrossGram", "DenseTarget", "FactorKind", "Gradient", "Gram", "Statistic", "Tile",
]  # fmt: skip
