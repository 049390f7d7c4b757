"""How many calibration sequences go through a block at once."""

from llmprune.model.memory import batch_size
from llmprune.planning import Host, multiplied_in
from llmprune.recipe import Recipe
from llmprune.statistics import Gradient
from llmprune.tuning import sequences_at_once

_AUTOCAST_TOKENS = 2048  # about so many in a forward on a CPU, as each forward rounds all weights to bfloat16 anew


def sequences_a_forward(host: Host, recipe: Recipe, longest: int, sequences: int) -> int:
    """Return how many of the sequences go through a block at once; one where gradients of single ones are needed.

    Args:
        host: the model.
        recipe: what the user asked for.
        longest: tokens of the longest sequence.
        sequences: how many there are.
    """
    if recipe.needs is Gradient:
        return 1
    most = batch_size(longest, host.config, host.dtype, host.device)
    if multiplied_in(host, recipe) and host.device.type == "cpu":
        most = max(1, _AUTOCAST_TOKENS // longest)
    return recipe.batch_size or (sequences_at_once(most, sequences) if recipe.tune_epochs else most)
