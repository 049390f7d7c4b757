"""`python -m llmprune`."""

from llmprune.cli import main

main()
