"""The largest sizes that are taken for a model's: what is beyond is damage, not a model."""

LARGEST_WIDTH = 2**24

SIZE_LIMITS = {
    "vocab_size": 2**31,
    "hidden_size": LARGEST_WIDTH,
    "intermediate_size": LARGEST_WIDTH,
    "num_layers": 10_000,
    "num_heads": LARGEST_WIDTH,
    "num_kv_heads": LARGEST_WIDTH,
    "head_dim": LARGEST_WIDTH,
    "max_position_embeddings": 2**31,
}
"""Field of ModelConfig -> the largest value. Larger ones would fill the memory, or overflow, before
anything could compare them with the weights."""


def shortened(text: str, length: int = 60) -> str:
    """`text` for a message: at most `length` characters of it."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
