"""Tokenizers give the ids of the libraries they wrap."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from data.errors import InputError
from data.hub import is_offline
from data.tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    holds_tokenizer,
    load_tokenizer,
)

TRICKY = [
    "a </s> b <s> c <unk>",
    "nul \0 byte",
    "runs     of      spaces\t\tand\n\n\nlines \r\n",
    "w" * 5000,
    "日本語 हिन्दी Ωμέγα \U0001f469\u200d\U0001f467 \ufffd",
    " leading and trailing ",
    "x",
    "",
]


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_sentencepiece_equals_the_library(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert [ids.tolist() for ids in tokenizer.encode(TRICKY)] == oracle.encode(TRICKY)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (320, 1, 2)
    assert tokenizer.adds_bos
    assert tokenizer.decode(tokenizer.encode(["the mask"])[0].tolist()) == "the mask"


def test_llama_tokenizer(shared_data: Path) -> None:
    path = shared_data / "llama-tokenizer.model"
    tokenizer = load_tokenizer(path)
    assert tokenizer.fingerprint.startswith("9e556afd")
    assert tokenizer.vocab_size == 32_000 and tokenizer.adds_bos
    ids = tokenizer.encode(["a </s> b"])[0].tolist()
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a </s> b"


def test_the_output_folder_of_a_run_stands_for_its_model(
    tiny_tokenizer: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_tokenizer, tmp_path / "model")
    assert load_tokenizer(tmp_path).record() == load_tokenizer(tiny_tokenizer).record()


def test_special_tokens_in_text_stay_text(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    for text, ids in zip(TRICKY, tokenizer.encode(TRICKY), strict=True):
        assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(ids.tolist())
        assert len(ids) == len(text.encode())  # one token per byte
        assert tokenizer.decode(ids.tolist()) == text


def test_hugging_face_properties(tiny_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259, 1, 2)
    assert not tokenizer.adds_bos
    assert load_tokenizer(tiny_tokenizer / "tokenizer.json").probe() == tokenizer.probe()


def test_bos_is_added_only_if_the_tokenizer_does_so_itself(tiny_tokenizer: Path) -> None:
    def add_bos(content: dict) -> None:
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }

    edit_json(tiny_tokenizer / "tokenizer.json", add_bos)
    tokenizer = load_tokenizer(tiny_tokenizer)
    assert tokenizer.adds_bos
    assert tokenizer.encode(["a"])[0].tolist() != [1] and len(tokenizer.encode(["a"])[0]) == 1


def test_truncation_and_padding_settings_are_ignored(tiny_tokenizer: Path) -> None:
    def truncate(content: dict) -> None:
        content["truncation"] = {
            "max_length": 4,
            "stride": 0,
            "strategy": "LongestFirst",
            "direction": "Right",
        }

    edit_json(tiny_tokenizer / "tokenizer.json", truncate)
    assert [len(ids) for ids in load_tokenizer(tiny_tokenizer).encode(["abcdefgh", "a"])] == [8, 1]


def test_survive_pickling(tiny_tokenizer: Path, sentencepiece_model: Path) -> None:
    for path in (tiny_tokenizer, sentencepiece_model):
        tokenizer = load_tokenizer(path)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.probe() == tokenizer.probe() and copy.record() == tokenizer.record()


def test_folder_with_only_a_sentencepiece_model(sentencepiece_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.record() == load_tokenizer(sentencepiece_model).record()
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not load_tokenizer(folder).adds_bos


def test_tokenizer_json_that_contradicts_the_model_beside_it_is_refused(
    tiny_tokenizer: Path, sentencepiece_model: Path
) -> None:
    (tiny_tokenizer / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    with pytest.raises(InputError, match="different ids for the same text"):
        load_tokenizer(tiny_tokenizer)


def test_probes_tell_tokenizers_apart(tiny_tokenizer: Path, sentencepiece_model: Path) -> None:
    assert load_tokenizer(tiny_tokenizer).probe() != load_tokenizer(sentencepiece_model).probe()


def test_missing_eos_is_refused(tiny_tokenizer: Path) -> None:
    edit_json(tiny_tokenizer / "tokenizer_config.json", lambda content: content.pop("eos_token"))
    with pytest.raises(InputError, match=r"no end-of-sequence token.*; set eos_token in"):
        load_tokenizer(tiny_tokenizer)
    # Of what is no folder, a user cannot edit the settings; nor those of a folder made on the way.
    model = tiny_tokenizer / "one.gguf"
    model.touch()
    with pytest.raises(
        InputError, match=r"one\.gguf has no .*; give a folder with tokenizer\.json"
    ):
        HuggingFaceTokenizer(tiny_tokenizer, model)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0")
    with pytest.raises(InputError, match=r"m\.gguf: its header is damaged"):
        load_tokenizer(tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        InputError, match=r"HF_HUB_OFFLINE forbids.*hf download nobody/nothing .*-dir"
    ):
        load_tokenizer("nobody/nothing")


def test_offline_is_what_the_hub_takes_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    for value, offline in (("1", True), ("yes", True), ("on", True), ("0", False), ("", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert is_offline() == offline
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "True")
    assert is_offline()


@pytest.fixture
def bpe_folder(tiny_tokenizer: Path, tmp_path: Path) -> Path:
    """The tiny tokenizer as vocab.json and merges.txt."""
    folder = tmp_path / "bpe"
    folder.mkdir()
    vocabulary = json.loads((tiny_tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_vocabulary_and_merges_are_a_tokenizer(bpe_folder: Path, tiny_tokenizer: Path) -> None:
    tokenizer, original = load_tokenizer(bpe_folder), load_tokenizer(tiny_tokenizer)
    assert holds_tokenizer(bpe_folder)
    assert tokenizer.probe() == original.probe() and tokenizer.eos_id == original.eos_id
    assert load_tokenizer(bpe_folder / "vocab.json").record() == tokenizer.record()
    assert pickle.loads(pickle.dumps(tokenizer)).record() == tokenizer.record()
    (bpe_folder / "merges.txt").write_text("#version: 0.2\na b\n")
    vocabulary = json.loads((bpe_folder / "vocab.json").read_text())
    (bpe_folder / "vocab.json").write_text(json.dumps(vocabulary | {"ab": 259}))
    assert load_tokenizer(bpe_folder).fingerprint != tokenizer.fingerprint
    assert load_tokenizer(bpe_folder).encode(["ab"])[0].tolist() == [259]
    (bpe_folder / "merges.txt").unlink()
    assert not holds_tokenizer(bpe_folder)
    with pytest.raises(InputError, match=r"nor vocab\.json with merges\.txt"):
        load_tokenizer(bpe_folder)


def test_the_largest_id_of_a_document(tiny_tokenizer: Path, sentencepiece_model: Path) -> None:
    assert load_tokenizer(tiny_tokenizer).largest_id == 258
    assert load_tokenizer(sentencepiece_model).largest_id == 319
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tiny_tokenizer)
    padded = load_tokenizer(tiny_tokenizer)
    assert (padded.vocab_size, padded.largest_id) == (260, 258)
    assert max(padded.encode(["a <pad> b"])[0]) <= 258
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tiny_tokenizer)
    assert load_tokenizer(tiny_tokenizer).largest_id == 260
    assert 260 in load_tokenizer(tiny_tokenizer).encode(["a word"])[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("special_tokens_map.json", "7"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "model_max_length": "x"}'),
    ],
)
def test_settings_that_cannot_be_used_are_named(name: str, text: str, tiny_tokenizer: Path) -> None:
    (tiny_tokenizer / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tiny_tokenizer)
    assert str(tiny_tokenizer) in str(caught.value)


def test_code_beside_a_tokenizer_is_not_run(tiny_tokenizer: Path, tmp_path: Path) -> None:
    (tiny_tokenizer / "tokenization_x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = {"auto_map": {"AutoTokenizer": [None, "tokenization_x.X"]}, "tokenizer_class": "X"}
    edit_json(tiny_tokenizer / "tokenizer_config.json", lambda content: content.update(names))
    with pytest.raises(InputError, match="no tokenizer can be read"):
        load_tokenizer(tiny_tokenizer)
    assert not (tmp_path / "ran").exists()
