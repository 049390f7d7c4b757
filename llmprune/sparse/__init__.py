"""Running pruned models: compressed checkpoints in transformers, sparse layers, and what they gain."""
