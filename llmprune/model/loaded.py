"""A whole model in memory, as plain transformers loads it."""

from typing import Any

import torch

from llmprune.checkpoint import Source
from llmprune.model.configuration import read_config
from llmprune.model.skeleton import quiet
from llmprune.model.streamed import stored_dtype


def load_causal_lm(
    source: Source, device: torch.device, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the model of a checkpoint on `device`; `dtype` None is the one that the checkpoint is stored in.

    Raises:
        CheckpointError, UnsupportedModelError: as `Streamed` does.
    """
    from transformers import AutoModelForCausalLM

    read_config(source.folder, source.config, trust_remote_code)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            source.folder,
            dtype=dtype or stored_dtype(source),
            device_map={"": str(device)},
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    model.eval()
    return model
