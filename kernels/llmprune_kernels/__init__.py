"""Kernels of llmprune, one folder an op, each with a readable reference. Independent of llmprune itself."""
