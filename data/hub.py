"""What the environment says about the Hugging Face hub."""

import os

_TRUE = ("1", "ON", "YES", "TRUE")


def is_offline() -> bool:
    """Whether the user forbids to ask the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE), in the words
    that huggingface_hub takes for true."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)
