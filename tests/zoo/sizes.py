"""What makes a configuration tiny: small values by field name, and what single architectures need beside them."""

LAYERS = 4
VOCABULARY = 256
WINDOW = 8  # shorter than the sequences of the tests, so that masks matter

# Numbers that are replaced wherever a configuration has a field of that name; a number that is smaller already stays.
_BY_VALUE: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab pronunciation_vocab_size "
    "shape_vocab_size decoder_vocab_size",
    128: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dim_ff dff mamba_d_ssm ffn_hidden_size "
    "feed_forward_size d_inner max_position_embeddings n_positions n_ctx max_target_positions max_source_positions",
    64: "hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim embedding_dim attention_hidden_size "
    "shared_intermediate_size lru_width input_embedding_size output_embedding_size hidden_size_global "
    "adapter_in_dim adapter_input_size adapter_out_dim",
    32: "shared_experts_intermediate_size mlp_dim q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size qk_head_dim linear_head_dim output_channels",
    16: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim o_lora_rank index_head_dim swa_head_dim d_head dim_head "
    "mamba_d_state mamba_d_head state_size mamba_headdim ssm_state_size mamba_head_dim linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input indexer_head_dim hc_lowrank attention_head_size",
    8: "sliding_window sliding_window_size attention_window_size local_attention window_size attention_chunk_size "
    "local_attention_window_len mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size block_size rotary_dim "
    "laurel_rank index_topk indexer_budget local_attn_chunk_length lsh_attn_chunk_length",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks depth "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_dt_rank "
    "time_step_rank linear_num_value_heads linear_conv_kernel_dim indexer_compress_ratio linear_num_heads",
    2: "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k moe_top_k index_n_heads n_mamba_heads linear_num_key_heads zero_expert_num "
    "indexer_n_heads hc_count",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace moe_layer_start_index "
    "num_dense_layers mamba_n_groups mamba_ngroups n_groups indexer_kv_heads num_expert_group",
    0: "num_kv_shared_layers",
}
SIZES = {name: value for value, names in _BY_VALUE.items() for name in names.split()}

# Special tokens keep out of the way of random ones.
TOKENS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "cls_token_id": 1,
    "sep_token_id": 2, "mask_token_id": 3, "forced_eos_token_id": None, "image_token_id": 200,
    "image_token_index": 200, "boi_token_id": 201, "eoi_token_id": 202, "audio_token_id": 203,
    "audio_token_index": 203, "boa_token_id": 204, "eoa_token_id": 205, "video_token_id": 206,
}  # fmt: skip
ORDINARY_TOKENS = (10, 190)  # from, to

# Fields that a configuration works out from others, or that say nothing of the model's shape.
DERIVED = {
    "architectures", "attention_layers", "attention_types", "block_types", "dtype", "id2label", "label2id",
    "layer_type", "layers_block_type", "mlp_layer_types", "model_type", "moe_layers", "no_rope_layers",
    "rope_parameters", "rope_scaling", "transformers_version",
}  # fmt: skip
