"""Training: `jobs` are whole runs, `trainer` is the loop, the rest are its parts."""
