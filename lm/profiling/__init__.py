"""Measurements of training steps: memory, time, benchmarks. No module here trains a run."""
