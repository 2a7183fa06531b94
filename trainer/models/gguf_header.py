"""What the header of a GGUF file must say for its model to be converted."""

from pathlib import Path

from data.errors import InputError
from data.gguf import read_header
from trainer.models.families import FAMILIES
from trainer.models.limits import SIZE_LIMITS, shortened

# Last part of a key that states a size -> the field of ModelConfig that it becomes.
_SIZES = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_layers",
    "head_count": "num_heads",
    "head_count_kv": "num_kv_heads",
    "key_length": "head_dim",
    "context_length": "max_position_embeddings",
}


def check_gguf(path: Path) -> None:
    """Raises InputError unless the header of a GGUF file is whole, states possible sizes and a
    known family, and says nothing that would be lost."""
    header = read_header(path, {key: SIZE_LIMITS[field] for key, field in _SIZES.items()})
    if header.parts > 1:
        raise InputError(
            f"cannot convert {path}: it is one of {header.parts} parts: join them first, with "
            "llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE.gguf`, and name the whole file"
        )
    if header.architecture not in FAMILIES:
        family = shortened(repr(header.architecture))
        raise InputError(
            f"cannot convert {path}: its architecture {family} is not supported; known families: "
            f"{', '.join(FAMILIES)}"
        )
    if header.scaled:
        raise InputError(
            f"cannot convert {path}: its rotary positions are scaled ({header.scaled}), which "
            "transformers leaves out when it reads GGUF, so that another model would come out; "
            "fetch the safetensors version"
        )
