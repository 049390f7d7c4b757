"""What single architectures need beside small numbers: fields by model type, those of a part under the part's name."""

from typing import Any

Fields = dict[str, Any]

_SLIDING = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["mamba", "mamba", "hybrid"] * 2
_COMPRESSED: Fields = {"num_key_value_heads": 4}  # multi-head latent attention has as many keys as queries
_ALL_COMPRESSED = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear",
    "minicpm3", "youtu",
)  # fmt: skip
_COMPASS: Fields = {
    "layer_types": _SLIDING,
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]} for kind in set(_SLIDING)
    },
}
_DOTS: Fields = {
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "per_layer_config": {
        layer: {"head_dim": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "num_attention_heads": 4}
        for layer in (1, 3)
    },
}
# Keys of the last two layers are those of the first two; some inputs of the first layer are exactly zero.
_GEMMA3N: Fields = {
    "intermediate_size": [128] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "num_kv_shared_layers": 2,
    "layer_types": _SLIDING,
}
_GEMMA4: Fields = {
    "layer_types": _SLIDING,
    "num_kv_shared_layers": 2,
    "per_layer_config": {layer: {"head_dim": 32} for layer in (1, 3)},
}
_GEMMA4_UNIFIED: Fields = {"layer_types": _SLIDING, "per_layer_config": _GEMMA4["per_layer_config"]}
_LLAMA4: Fields = {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 128}
_QWEN4: Fields = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "hc_count": 2,
    "hc_lowrank": 16,
}

OVERRIDES: dict[str, Fields] = {
    **dict.fromkeys(_ALL_COMPRESSED, _COMPRESSED),
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "cohere_compass_text": _COMPASS,
    "dbrx": {
        "num_hidden_layers": 3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "dots3_note": {"text_config": _DOTS, "vision_config": {"per_layer_config": {}}},
    "dots3_note_text": _DOTS,
    "emu3": {"vocabulary_map": {"<image>": 200}, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4_UNIFIED},
    "gemma4_unified_text": _GEMMA4_UNIFIED,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "laguna": {"num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": _LLAMA4},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"num_layers": 2, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "hash_seed": 0,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layer_types": _HYBRID,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layer_types": _HYBRID,
        "hybrid_layer_ids": [2, 5],
        "num_mem_blocks": 1,
        "n_mamba_heads": 8,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
}
