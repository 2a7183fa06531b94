"""Data fits the model by the ids that occur, and advice helps where it does not."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from data.errors import InputError
from data.reader import TokenReader
from tests.factories import write_tokens
from trainer.inputs import check_tokenizer, missing_data, warn_of_no_tokenizer
from trainer.models.hf import load_config


def model_with_ids(workspace: Path, folder: Path, special: bool, **tokens: Any) -> Path:
    """A copy of the model whose tokenizer has more ids than the model has rows."""
    shutil.copytree(workspace / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if special:
        tokenizer.add_special_tokens(tokens)
    else:
        tokenizer.add_tokens(["fox"])
    tokenizer.save_pretrained(folder)
    return folder


def check(data: Path, source: Path) -> None:
    reader = TokenReader(data, 64)
    check_tokenizer(reader, load_config(source), source, str(data))


@pytest.mark.parametrize(
    "tokens",
    [{"pad_token": "<pad>"}, {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}],
)
def test_special_ids_beyond_the_model_do_no_harm(
    tokens: Any, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model_with_ids(workspace, tmp_path / "model", True, **tokens)
    check(write_tokens(tmp_path / "tokens", source), source)
    assert "ids, the model 259: the special ids beyond are never" in capsys.readouterr().err


def test_words_beyond_the_model_are_refused_with_what_helps(
    workspace: Path, tmp_path: Path
) -> None:
    source = model_with_ids(workspace, tmp_path / "model", False)
    data = write_tokens(tmp_path / "tokens", source)
    with pytest.raises(InputError, match=r"260 ids, .* 259; text can give ids up to 259\. Remove"):
        check(data, source)
    # What the message says is done, and ends it.
    shutil.copy(workspace / "model" / "tokenizer.json", source)
    with pytest.raises(InputError, match="tokenize again"):
        check(data, source)
    check(write_tokens(tmp_path / "again", source), source)


def test_an_end_token_beyond_the_model_is_named(workspace: Path, tmp_path: Path) -> None:
    source = model_with_ids(workspace, tmp_path / "model", True, eos_token="<|end|>")
    with pytest.raises(InputError, match=r"ends every document, is id 259: set eos_token in"):
        check(write_tokens(tmp_path / "tokens", source), source)


def test_data_of_another_copy_of_the_tokenizer_is_tokenized_again(
    workspace: Path, tmp_path: Path
) -> None:
    padded = model_with_ids(workspace, tmp_path / "padded", True, pad_token="<pad>")
    data, source = write_tokens(tmp_path / "tokens", padded), workspace / "model"
    with pytest.raises(InputError) as caught:
        check(data, source)
    advised = re.search(r"tokenize again .*--tokenizer (\S+)", str(caught.value))
    assert advised is not None
    check(write_tokens(tmp_path / "again", Path(advised[1])), source)


def test_another_end_of_documents_is_said(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As between a model and its version for chats, which agree on every text."""
    source = model_with_ids(workspace, tmp_path / "model", True, eos_token="<s>")
    check(write_tokens(tmp_path / "own", source), source)
    assert "end with" not in capsys.readouterr().err
    check(write_tokens(tmp_path / "tokens", workspace / "model"), source)
    shown = capsys.readouterr().err
    assert "end with id 2" in shown and "ends with 1: what" in shown
    assert f"tokenize again with --tokenizer {source}" in shown


def test_without_a_tokenizer_the_models_own_is_asked_for(workspace: Path, tmp_path: Path) -> None:
    padded = model_with_ids(workspace, tmp_path / "padded", True, pad_token="<pad>")
    data = write_tokens(tmp_path / "tokens", padded)
    source = tmp_path / "model"
    shutil.copytree(workspace / "model", source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"fetch the model's own tokenizer .*tokenize again"):
        check(data, source)


def test_offline_nothing_is_to_be_fetched_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = missing_data(str(tmp_path), 64, "tok")
    assert message is not None and "on a machine that may use the network, copy it here" in message
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    message = missing_data(str(tmp_path), 64, "tok")
    assert message is not None and "network" not in message


def test_a_model_without_a_tokenizer_is_told_at_the_start(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_no_tokenizer(workspace / "model")
    assert not capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    warn_of_no_tokenizer(bare)
    assert f"{bare} holds no tokenizer" in capsys.readouterr().err


def set_token(source: Path, **tokens: str | None) -> None:
    """Edits tokenizer_config.json, as messages say."""
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | tokens))


def test_an_end_that_was_changed_after_tokenizing_is_tokenized_again(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = tmp_path / "model", tmp_path / "tokens"
    shutil.copytree(workspace / "model", source)
    set_token(source, eos_token="<|endoftext|>")
    write_tokens(data, source)
    with pytest.raises(InputError, match=r"is id 259: set eos_token in .* tokenize again"):
        check(data, source)
    set_token(source, eos_token="a")
    with pytest.raises(InputError, match="ends every document, is id 259: tokenize again with the"):
        check(data, source)
    with pytest.raises(InputError, match="--overwrite to replace"):
        write_tokens(data, source)
    write_tokens(tmp_path / "again", source)
    capsys.readouterr()
    check(tmp_path / "again", source)
    assert not capsys.readouterr().err
    # Text that is all right is not to be tokenized by a tokenizer that is not.
    set_token(source, eos_token="<|endoftext|>")
    check(tmp_path / "again", source)
    assert "The model has no row for 259: set eos_token in" in capsys.readouterr().err
    # Nobody has the tokenizer that made it.
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"is id 259: fetch the model's own tokenizer .* again"):
        check(data, source)


def test_another_beginning_of_documents_is_said_or_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = TokenReader(workspace / "tokens", 64)
    model, source = load_config(workspace / "model"), workspace / "model"
    begins = replace(reader.manifest.tokenizer, bos_id=1, adds_bos=True)
    reader.manifest = replace(reader.manifest, tokenizer=begins)
    check_tokenizer(reader, model, source, "tokens")
    assert "begin with id 1, and the tokenizer of" in capsys.readouterr().err
    beyond = replace(begins, bos_id=300, vocab_size=301)
    reader.manifest = replace(reader.manifest, tokenizer=beyond)
    with pytest.raises(InputError, match="begins every document, is id 300: tokenize again with"):
        check_tokenizer(reader, model, source, "tokens")
