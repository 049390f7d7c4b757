"""2:4 weights in 9/16 of their bytes for GPUs: two kept values and their places for every four columns."""
