"""Imported by the server that runs are forked from: one run there, and no fork has to import what a run needs."""

import gc
import tempfile

import torch

import llmprune

torch.set_num_threads(1)  # a process with threads cannot be forked safely
with tempfile.TemporaryDirectory() as folder:
    llmprune.prune("demo", f"{folder}/out", samples=1, length=8)
gc.freeze()  # a run collects garbage at its end, and need not look through all of this again
