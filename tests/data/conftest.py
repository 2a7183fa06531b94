"""Fixtures of the data tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data import cli, machine
from data.find import find_files
from data.job import Job
from data.sources import Fields
from data.tasks import Settings
from data.tokenizers import Tokenizer, load_tokenizer
from tests.data.helpers import FILES
from tests.factories import write_documents


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


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and no settings or ranks in the environment."""
    monkeypatch.chdir(tmp_path)
    ours = ("SHORN_", *machine.GROUP_VARIABLES, machine.LAUNCHED)
    for name in [name for name in os.environ if name.startswith(ours)]:
        monkeypatch.delenv(name)
    # Tests before these may have left one, and `run` would end this process.
    monkeypatch.setattr(cli, "_has_process_group", lambda: False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of JSON Lines in two domains, alpha and beta."""
    for index in range(FILES):
        write_documents(tmp_path / "text" / f"{index}.jsonl", number=20, seed=index)
    return tmp_path / "text"


@pytest.fixture
def tokenizer(sentencepiece_model: Path) -> Tokenizer:
    """That of `sentencepiece_model`."""
    return load_tokenizer(sentencepiece_model)


@pytest.fixture
def make_job(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Job]:
    """Job with one file a task."""

    def make(output: str = "tokens", overwrite: bool = False, **settings: Any) -> Job:
        defaults: dict[str, Any] = {
            "fields": Fields(),
            "domains": (),
            "held_out": 0.1,
            "max_bytes_per_domain": None,
            "bytes_per_task": 1,
        }
        return Job(
            find_files([str(source)]),
            Settings(**(defaults | settings)),
            tokenizer,
            tmp_path / output,
            overwrite,
        )

    return make
