"""Inputs shared by the pruner's tests."""

from pathlib import Path

import pytest

from tests.factories import write_model, write_tokens


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a three-block model and a token folder of two domains."""
    root = tmp_path_factory.mktemp("inputs")
    model = write_model(root / "model", num_hidden_layers=3)
    write_tokens(root / "tokens", model, number=40)
    return root
