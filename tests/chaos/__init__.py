"""Disturbed runs and damaged files: nothing is lost, doubled or read wrong, and refusals help."""
