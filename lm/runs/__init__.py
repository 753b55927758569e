"""Runs on disk: the folder, the loaded run, its card and its curves."""
