"""The k-th smallest of many numbers, and the highest of groups of a few."""
