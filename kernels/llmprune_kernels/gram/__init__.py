"""Sums of products of inputs, XᵀY, from which Gram matrices are made."""
