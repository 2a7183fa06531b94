"""Decoder language models with Hugging Face parameter names, and their masks, weights and files."""
