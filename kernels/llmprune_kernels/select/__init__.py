"""The k-th smallest of many numbers."""
