"""What measures a training: memory, time, benchmarks; nothing here trains a run."""
