"""Tokenizers in GGUF files: llama.cpp splits text as the model's own tokenizer does."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from launch.export.vocabulary import PRE_TOKENIZERS, read_vocabulary
from tests.factories import WORDS, write_model, write_tokenizer
from tests.launch.export.test_export import export

pytest.importorskip("gguf", reason="needs gguf (pip install 'shorn[export]')")
LLAMA_CPP = find_spec("xllamacpp") is not None


def trained(folder: Path, steps: Any) -> Path:
    """A byte-level BPE tokenizer that splits by the pre-tokenizer `steps`, with merges."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    made: list[Any] = []
    for kind, value in steps:
        if kind == "Split":
            made.append(pre_tokenizers.Split(Regex(value), "isolated"))
        elif kind == "Digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=value == "True"))
    write_tokenizer(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(made) if len(made) > 1 else made[0]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    text = " ".join(WORDS) + " 12345 123 don't I'm  def f(x):\n\n return 2024!! \t straße 日本語 "
    tokenizer.train_from_iterator([text] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", PRE_TOKENIZERS.values())
def test_text_is_split_alike(name: str, tmp_path: Path) -> None:
    (steps,) = (steps for steps, own in PRE_TOKENIZERS.items() if own == name)
    tokenizer = trained(tmp_path / "tokenizer", steps)
    size = 1 + max(
        json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"].values()
    )
    folder = write_model(tmp_path / "model", tokenizer, vocab_size=size + 3)
    vocabulary = read_vocabulary(folder, size + 3)
    assert (vocabulary.kind, vocabulary.pre, vocabulary.scores) == ("gpt2", name, None)
    assert vocabulary.tokens[size:] == [f"[PAD{size + i}]".encode() for i in range(3)]
    assert vocabulary.types[:4] == [3, 3, 3, 1] and vocabulary.types[-1] == 5
    (entry,) = export(folder, tmp_path / "out")
    if LLAMA_CPP:
        assert entry["llama_cpp"]["text_tokens"] > 50


@pytest.mark.parametrize("own", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece_is_split_alike(own: str, shared_data: Path, tmp_path: Path) -> None:
    """From its own file, and from what transformers makes of it."""
    folder = write_model(tmp_path / "model", vocab_size=32_000)
    (folder / "tokenizer.json").unlink()
    shutil.copy(shared_data / "llama-tokenizer.model", folder / "tokenizer.model")
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    settings |= {"unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if own == "tokenizer.json":
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "fast")
        (folder / "tokenizer.model").unlink()
        shutil.copytree(tmp_path / "fast", folder, dirs_exist_ok=True)
    vocabulary = read_vocabulary(folder, 32_000)
    assert (vocabulary.kind, vocabulary.pre) == ("llama", "default")
    assert vocabulary.adds_bos and vocabulary.adds_space and vocabulary.scores is not None
    assert vocabulary.types[:4] == [2, 3, 3, 6] and vocabulary.tokens[3] == b"<0x00>"
    (entry,) = export(folder, tmp_path / "out")
    if LLAMA_CPP:
        assert entry["llama_cpp"]["text_tokens"] > 50


def test_tokenizers_that_gguf_cannot_keep_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"has the id \d+ .*no row: it has 20; fetch"):
        read_vocabulary(folder, 20)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["type"] = "Unigram"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"is of type Unigram, and llama.cpp's BPE"):
        read_vocabulary(folder, 300)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="holds no tokenizer that GGUF can keep"):
        read_vocabulary(folder, 300)


def test_all_that_ends_a_text_goes_along(tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = write_model(tmp_path / "model", vocab_size=261)
    write_tokenizer(folder, "<|end|>", "<|more|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [260, 2, None]}))
    (entry,) = export(folder, tmp_path / "out", "--check", "tensors")
    fields = GGUFReader(entry["path"]).fields
    found = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")}
    assert found == {"eos": 2, "eot": 260}


def test_tokens_that_take_blanks_in_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tokenizer(tmp_path, "<|end|>")
    read_vocabulary(folder, 260)
    assert "take the blanks" not in capsys.readouterr().err
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["rstrip"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))
    read_vocabulary(folder, 260)
    assert "'<|end|>' take the blanks beside them in" in capsys.readouterr().err
