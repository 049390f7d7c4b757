"""Choice of the lowest scores by an exact count, without a sort."""
