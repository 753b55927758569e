"""Loaded models and the threads that run them."""
