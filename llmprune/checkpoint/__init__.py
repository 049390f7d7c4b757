"""Checkpoints as files: a lazy source, an atomic sink. Nothing here knows a model."""

from llmprune.checkpoint.header import TensorEntry
from llmprune.checkpoint.place import ALLOCATION
from llmprune.checkpoint.sink import Sink
from llmprune.checkpoint.source import Source

__all__ = ["ALLOCATION", "Sink", "Source", "TensorEntry"]
