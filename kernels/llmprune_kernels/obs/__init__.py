"""Optimal-brain-surgeon recursion over one block of columns: remove weights, let those to the right compensate."""
