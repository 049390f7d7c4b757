"""Tiny models with random weights, saved as checkpoints: small enough to prune whole families in seconds."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 160
CONTEXT = 48
BLOCKS = 3
SHARD = "120KB"  # cuts every family into several shards

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Sliding and full attention take turns, and the window is shorter than the sequences of the tests.
_GEMMA2: dict[str, Any] = _SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 4, "sliding_window": 8}

# The file has a matrix for each expert, the model one tensor for all of them.
_MOE: dict[str, Any] = _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_MOE: dict[str, Any] = _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK: dict[str, Any] = {name: value for name, value in _SIZES.items() if name != "head_dim"} | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_LLAMA4: dict[str, Any] = _LOCAL_MOE | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
_JETMOE: dict[str, Any] = _SIZES | {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
_DBRX: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": BLOCKS,
    "max_seq_len": CONTEXT,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
}

FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, _SIZES),
    "llama-tied": (LlamaConfig, _SIZES | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, _SIZES),
    "gpt2": (GPT2Config, _GPT2),
    "opt": (OPTConfig, _OPT),
    "gemma2": (Gemma2Config, _GEMMA2),
    "qwen3-moe": (Qwen3MoeConfig, _MOE),
}
# How experts are stored: a file's matrix for each or one tensor for all, transposed or not, in or out of
# transformers' experts interface.
EXPERTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, _LOCAL_MOE),
    "qwen3-moe": (Qwen3MoeConfig, _MOE),
    "olmoe": (OlmoeConfig, _MOE),
    "deepseek-v3": (DeepseekV3Config, _DEEPSEEK),
    "gpt-oss": (GptOssConfig, _LOCAL_MOE | {"sliding_window": 8}),
    "llama4": (Llama4TextConfig, _LLAMA4),
    "jetmoe": (JetMoeConfig, _JETMOE),
    "dbrx": (DbrxConfig, _DBRX),
}


def config(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model, with some fields changed."""
    config_class, fields = (FAMILIES | EXPERTS)[family]
    return config_class(**fields | changes)


def model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny model with random weights, biases and norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config(family, **changes))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    made.to(dtype=dtype)  # type: ignore[call-arg]
    made.eval()
    return made


def save(made: PreTrainedModel, folder: Path, shard: str = SHARD) -> Path:
    """Save a model in shards of at most that size and return the folder."""
    made.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_base(made: PreTrainedModel, folder: Path) -> Path:
    """Save a model whose head is tied as the first checkpoints were: tensor names without the base model's prefix."""
    base: Any = made.base_model
    base.save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"architectures": [type(made).__name__]}))
    return folder


def load(folder: Path) -> Any:
    """Return the model of a folder as a user of plain transformers would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)


def logits(made: Any, ids: Tensor) -> Tensor:
    """Return the logits of a model's own forward."""
    with torch.no_grad():
        found: Tensor = made(input_ids=ids, use_cache=False).logits
    return found


def ids(samples: int = 6, length: int = 24, seed: int = 1) -> Tensor:
    """Return random token ids [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder by name, as the safetensors library reads them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors have one dtype, one shape and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def rewrite(folder: Path, **changes: Tensor | None) -> Path:
    """Save a checkpoint folder anew as one file, with some tensors replaced, or left out where they are None."""
    changed = {name: value for name, value in (tensors(folder) | changes).items() if value is not None}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
