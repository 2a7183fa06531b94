"""Settings of the rotary position embedding, read from transformers' `rope_parameters`."""

from typing import Any

from data.errors import InputError
from data.records import word_for
from trainer.models.limits import shortened

ROPE_TYPES = ("default", "linear", "llama3")
_LARGEST = 1e30
# What each type is computed from, besides the base.
_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(parameters: object) -> tuple[float, float, dict[str, Any] | None]:
    """Base, rotated share of each head, and `ModelConfig.rope_scaling`.

    Raises InputError for a type that is not supported, and for a setting that is missing or no
    positive number.
    """
    if not isinstance(parameters, dict):
        raise InputError(f"rope_parameters is {word_for(parameters)}, not an object")
    rope = dict(parameters)
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise InputError(
            f"rope_parameters differ between layers ({', '.join(nested)}), which is not supported; "
            "only one rotary embedding for all layers is"
        )
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise InputError(
            f"rope type {shortened(repr(rope_type))} is not supported; supported: "
            f"{', '.join(ROPE_TYPES)}"
        )
    theta = _positive(rope, "rope_theta")
    rope.pop("rope_theta")
    fraction = _positive(rope, "partial_rotary_factor") if "partial_rotary_factor" in rope else 1.0
    rope.pop("partial_rotary_factor", None)
    for name in _SETTINGS[rope_type]:
        _positive(rope, name)
    return theta, fraction, None if rope_type == "default" else rope


def _positive(rope: dict[str, Any], name: str) -> float:
    value = rope.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST:
        return float(value)
    shown = (
        "missing"
        if name not in rope
        else word_for(value)
        if value is None
        else shortened(repr(value))
    )
    raise InputError(
        f"{name} of the rotary position embedding is {shown}; it must be a number above 0, as in "
        "the model's original config.json"
    )
