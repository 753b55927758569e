"""Whole jobs: train, resume, choose options, check a resume, follow a run."""
