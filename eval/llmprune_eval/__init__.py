"""How good a model still is. Built on llmprune's public functions only."""
