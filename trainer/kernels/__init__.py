"""Operators of our own: PyTorch references, and the libraries that csrc/ was compiled to."""
