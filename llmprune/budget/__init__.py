"""Which pattern each site gets: the recipe's, one that is stated for it, or its part of a budget over the model."""

from llmprune.budget.choice import Chooser

__all__ = ["Chooser"]
