"""The trainer's loop and its parts; whole jobs are in `lm.jobs`."""
