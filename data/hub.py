"""How models on the Hugging Face hub are named, and what the environment says about the hub."""

import os

_TRUE = ("1", "ON", "YES", "TRUE")


def is_offline() -> bool:
    """Whether the user forbids to ask the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE), in the words
    that huggingface_hub takes for true."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def split_revision(name: str) -> tuple[str, str | None]:
    """`org/name@revision` as the name and the branch, tag or commit; None where none is given."""
    bare, _, revision = name.partition("@")
    return bare, revision or None
