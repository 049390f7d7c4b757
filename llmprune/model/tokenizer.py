"""A model's tokenizer, only where text has to become tokens."""

from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError, first_line
from llmprune.model.skeleton import quiet


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Return the tokenizer of a model folder.

    Raises:
        CheckpointError: the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers and optional packages raise
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise CheckpointError(
                f"the tokenizer of {folder} runs code of its own; read it, then allow it with --trust-remote-code"
            ) from None
        raise CheckpointError(
            f"{folder} has no tokenizer that loads ({first_line(error)}): add one, or give data with an input_ids column"
        ) from None
