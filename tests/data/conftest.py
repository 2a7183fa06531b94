"""Fixtures of the data tests."""

from pathlib import Path

import pytest
import sentencepiece


@pytest.fixture
def sentencepiece_model(tmp_path: Path) -> Path:
    """A BPE model of 320 pieces; loads in milliseconds, without transformers."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the mask keeps what the count allows {i}" for i in range(300)))
    prefix = tmp_path / "small"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")
