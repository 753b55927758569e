"""How good a model is: exact perplexity, and the report made of it."""
