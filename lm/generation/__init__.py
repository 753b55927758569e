"""Generates text: options → filters → sampler → engine, over a decoder."""
