"""What a path is, is told by what lies there, and every option that it does not fit says so."""

import json
from pathlib import Path

import pytest

from data.errors import InputError
from data.find import find_files
from data.manifest import Manifest
from data.places import odd_name, what_is
from data.tokenize import main as tokenize
from data.tokenizers import load_tokenizer

KINDS = {
    "nothing": "",
    "empty": "an empty folder",
    "void": "an empty file",
    "tokens": "a folder of tokens, as --data takes it",
    "tokens/": "a folder of tokens, as --data takes it",
    "tokens/train": "a part of the tokens in tokens, which --data takes",
    "tokens/train/a/0.bin": "a part of the tokens in tokens, which --data takes",
    "tokens/manifest.json": "the manifest of the tokens in tokens, which --data takes",
    "model": "a model's folder, as --model, --source and --tokenizer take it",
    "model/config.json": "a file of the model in model, which options take as a folder",
    "model/model.safetensors": "a file of the model in model, which options take as a folder",
    "model/config.json/x": "below model/config.json, which is no folder",
    "run": "the folder of a run",
    "run/checkpoints/step-1": "a part of the run in run",
    "run/metrics.jsonl": "a record of the run in run",
    "adapter": "the folder of an adapter",
    "texts": "a folder of text, as --input takes it",
    "texts/a.txt": "a file of text",
    "extension": "a folder of text, as --input takes it",
    "lost": "a link that leads nowhere (gone)",
    "/dev/null": "a pipe or a device",
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "tokens/manifest.json": "{\n}",
        "tokens/train/a/0.bin": "ab",
        "model/config.json": json.dumps({"model_type": "llama"}, indent=1),
        "model/model.safetensors": "x",
        "run/run.json": json.dumps({"command": "cpt"}, indent=1),
        "run/metrics.jsonl": "{}",
        "run/checkpoints/step-1/state": "x",
        "adapter/adapter_config.json": "{}",
        "texts/a.txt": "x",
        # Other programs' files, called as ours are.
        "extension/manifest.json": '{"text": "x"}',
        "extension/config.json": '{"text": "y"}',
        "extension/run.json": '{"text": "z"}',
        "void": "",
    }
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    Path("empty").mkdir()
    Path("lost").symlink_to("gone")


@pytest.mark.parametrize(("name", "found"), KINDS.items())
def test_what_lies_at_a_path_is_told(name: str, found: str) -> None:
    assert what_is(Path(name)) == found


@pytest.mark.parametrize("name", [*KINDS][3:13])
def test_models_runs_and_tokens_are_no_text(name: str) -> None:
    """Some were read as documents until something in them broke."""
    with pytest.raises(InputError, match=r"^--input .*(and no text|not read|matches no files)"):
        find_files([name])


def test_a_folder_with_files_that_are_merely_called_so_is_text() -> None:
    names = ["extension/config.json", "extension/manifest.json", "extension/run.json"]
    assert [str(path) for path in find_files(["extension"])] == names


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("nothing", "empty")])
def test_a_folder_without_tokens_is_told_by_what_it_is(name: str) -> None:
    if (Path(name) / "manifest.json").exists():
        return
    with pytest.raises(InputError) as caught:
        Manifest.load(Path(name))
    assert f": it is {KINDS[name]}; " in str(caught.value)
    assert ("tokenize it with" in str(caught.value)) == ("of text" in KINDS[name])


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model/model.safetensors", "is a file of the model in model"),
        ("void", "void is an empty file, and no tokenizer"),
        ("texts", r"merges.txt \(it is a folder of text"),
        ("texts/a.txt", "is a file of text, and no tokenizer"),
        ("texts/a.txt/b", "below texts/a.txt, which is no folder"),
        ("run/model", "no tokenizer at run/model: no such file"),
        ("nothere/", "no tokenizer at nothere/: no such file"),
        ("nothere/a.gguf", "no tokenizer at nothere/a.gguf: no such file"),
        ("lost", "it is a link that leads nowhere"),
        ("/dev/null", "/dev/null is a pipe or a device"),
        ("file:///a/b%20c", "give the path alone: /a/b c"),
        ("model,run", "separate names by spaces: model run"),
        ("mod*", "only --input takes patterns"),
    ],
)
def test_what_is_no_tokenizer_is_told_with_the_option(name: str, advice: str) -> None:
    """None of these is asked for on the hub."""
    with pytest.raises(InputError, match=f"^--tokenizer: .*{advice}"):
        tokenize(["--input", "texts", "--tokenizer", name])


def test_a_tokenizer_in_a_folder_below_is_named() -> None:
    Path("texts/inner").mkdir()
    for folder in ("texts/inner", "model"):
        Path(folder, "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"merges\.txt \(texts/inner does\)"):
        load_tokenizer("texts")
    with pytest.raises(InputError, match=r"and no tokenizer \(that is in model\)"):
        load_tokenizer("model/config.json")


def test_names_written_for_something_else_get_advice() -> None:
    assert odd_name("'model'", patterns=False) == (
        "leave out the quotes and spaces around the name: model"
    )
    assert odd_name("model run") == "separate names by spaces: model run"
    assert odd_name("a b") == odd_name("a,b") == odd_name("mod*") == ""
