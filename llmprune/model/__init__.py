"""The room of transformers: find blocks and sites, load one block at a time, stream calibration.

Beside it only `llmprune.sparse` imports transformers: to load compressed checkpoints, and to generate text.
"""

from llmprune.model.configuration import read_config
from llmprune.model.lanes import Lanes
from llmprune.model.loaded import load_causal_lm
from llmprune.model.outline import Outline
from llmprune.model.resident import Resident
from llmprune.model.streamed import Streamed, streamed_logits
from llmprune.model.tokenizer import load_tokenizer

__all__ = [
    "Lanes",
    "Outline",
    "Resident",
    "Streamed",
    "load_causal_lm",
    "load_tokenizer",
    "read_config",
    "streamed_logits",
]
