"""Behaviour added to the training loop, one concern per file, each with its own saved state."""
