"""Sizes that are taken for a model's: beyond the largest is damage, and heads have even widths."""

from data.errors import InputError

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


def require_even_heads(hidden: int, heads: int) -> None:
    """Raises InputError unless --hidden gives each of --heads an even number of dimensions, which
    rotary positions turn in pairs."""
    step = 2 * heads
    if hidden % step:
        nearest = max(1, round(hidden / step)) * step
        raise InputError(
            f"--hidden {hidden}: each of --heads {heads} gets {hidden / heads:g} dimensions, and "
            f"needs an even number of them; use for example --hidden {nearest}"
        )
