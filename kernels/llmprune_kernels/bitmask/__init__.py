"""Matrices as a bitmask and the values it marks: half the bytes at half the zeros, and faster to multiply by."""
