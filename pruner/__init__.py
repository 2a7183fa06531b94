"""Learned pruning of decoder language models to a fixed target shape."""
