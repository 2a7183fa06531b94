"""Fixtures every test may use. Tiny models and token folders are made by tests/factories.py."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import given

ROOT = Path(__file__).resolve().parent.parent


def asks_for_gpu(config: pytest.Config) -> bool:
    """Whether -m selects the tests that run on a GPU."""
    return re.search(r"(?<!not )\bgpu\b", config.option.markexpr) is not None


def pytest_configure(config: pytest.Config) -> None:
    # Other tests are about CPU ranks, forked from a process that must not have touched a GPU.
    if not asks_for_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real documents, tokenizer and evaluation texts beside the clone; skips without them."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the sample data folder beside the clone")
    return path


@pytest.fixture(autouse=True)
def no_process_group_left_behind() -> Iterator[None]:
    """A process group opened by one test must not leak into the next one's (forked) ranks."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_command_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's command line takes is not what another test's functions were called by."""
    monkeypatch.setattr(given, "_flags", set())


@pytest.fixture
def tiny_tokenizer(tmp_path: Path) -> Path:
    """Folder of a byte-level tokenizer with 259 ids (see factories.write_tokenizer)."""
    from tests.factories import write_tokenizer

    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """Folder of a random two-layer Llama with its tokenizer (see factories.write_model)."""
    from tests.factories import write_model

    return write_model(tmp_path / "model")


@pytest.fixture
def tiny_tokens(tmp_path: Path, tiny_tokenizer: Path) -> Path:
    """Token folder with two domains and held-out documents, 64 tokens a sample."""
    from tests.factories import write_tokens

    return write_tokens(tmp_path / "tokens", tiny_tokenizer)
