"""How much disk a run needs."""

from llmprune.checkpoint import Source
from llmprune.forecast.parts import Part
from llmprune.model import Outline


def disk(host: Outline, source: Source | None) -> Part:
    """Return the disk that the output takes: as much as its source."""
    if source is not None:
        return Part("output", source.output_bytes(), "size of the checkpoint's files")
    tied = host.model.all_tied_weights_keys
    stored = sum(p.nbytes for name, p in host.model.named_parameters() if name not in tied)
    dtype = str(host.dtype).removeprefix("torch.")
    return Part("output", stored, f"parameters that config.json asks for, in {dtype}")
