"""Commands of the command line beside `prune` and `inspect`, one module each; `llmprune.cli` gathers them."""
