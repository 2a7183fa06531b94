"""Training: model families, parallelism, the loop, its callbacks, checkpoints and evaluation."""
