"""Inputs shared by the trainer's tests."""

from pathlib import Path

import pytest

from tests.factories import write_model, write_tokenizer, write_tokens


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tokenizer/, model/ (random two-layer Llama) and tokens/ (64 tokens a sample)."""
    folder = tmp_path_factory.mktemp("trainer")
    tokenizer = write_tokenizer(folder / "tokenizer")
    write_model(folder / "model", tokenizer)
    write_tokens(folder / "tokens", tokenizer)
    return folder
