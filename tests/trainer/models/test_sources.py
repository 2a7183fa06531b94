"""How the name of a model becomes a folder, and remedies where it does not."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError

from data.errors import InputError
from data.hub import is_hub_id
from data.tokenizers import load_tokenizer
from trainer.models import sources
from trainer.models.hf import load_model
from trainer.models.sources import convert_gguf, resolve_model


def _touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_model_folders_and_run_folders_are_found(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    _touch(model / "config.json", model / "model.safetensors")
    assert resolve_model(str(model)) == model
    assert resolve_model(str(tmp_path / "run")) == model
    assert resolve_model(model) == model


def test_what_is_not_a_model_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model.*config\.json"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    _touch(tmp_path / "lora" / "adapter_config.json", tmp_path / "lora" / "adapter.safetensors")
    with pytest.raises(InputError, match=r"an adapter.*merge_and_unload"):
        resolve_model(str(tmp_path / "lora"))
    _touch(tmp_path / "lora" / "config.json")
    with pytest.raises(InputError, match=r"an adapter.*merge_and_unload"):
        resolve_model(str(tmp_path / "lora"))
    _touch(tmp_path / "job" / "checkpoint-9" / "config.json")
    with pytest.raises(InputError, match=r"no config\.json; its folder checkpoint-9 does"):
        resolve_model(str(tmp_path / "job"))
    _touch(tmp_path / "config.json", tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin.*save_pretrained"):
        resolve_model(str(tmp_path))
    _touch(tmp_path / "two" / "a.gguf", tmp_path / "two" / "b.gguf")
    with pytest.raises(InputError, match=r"2 GGUF files"):
        resolve_model(str(tmp_path / "two"))


def test_a_hub_model_that_cannot_be_fetched_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, local_files_only: bool = False, **_: object) -> str:
        raise OSError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        resolve_model("meta-llama/Llama-2-7b-hf")
    message = str(caught.value)
    assert message.startswith("--model meta-llama/Llama-2-7b-hf: ") and "no connection" in message
    assert "licence at https://huggingface.co/meta-llama/Llama-2-7b-hf" in message
    assert "hf auth login" in message
    assert (
        "hf download meta-llama/Llama-2-7b-hf --include '*.json' --include '*.safetensors' "
        "--include '*.jinja' --include 'LICENSE*' --include '*.txt' --include 'tokenizer.model' "
        "--local-dir models/Llama-2-7b-hf\n" in message
    )
    assert message.endswith("then give --model models/Llama-2-7b-hf")


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("meta-llama/Llama-2-7b-hf@abc", True),
        ("meta-llama/Llama-2-7b-hf@refs/pr/1", True),
        ("meta-llama/Llama-2-7b-hf@", False),
        ("here/typo@abc", False),
        ("here/typo@refs/pr/1", False),
        ("runs/shear", False),
        ("models/Llama-2-7b-hf", False),
        ("./a/b", False),
        ("../b", False),
        ("~/b", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("model", False),
        ("here/typo", False),
        ("absent/tokenizer.json", False),
        ("absent/model.GGUF", False),
    ],
)
def test_what_looks_like_a_path_is_never_a_hub_id(
    text: str, hub: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(text) == hub
    if not hub:
        monkeypatch.setattr("huggingface_hub.snapshot_download", None)
        with pytest.raises(InputError, match=f"{text}: no such model"):
            resolve_model(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("texts/a.txt", r"and no GGUF \(it is a file of text\): name a folder"),
        ("model/config.json", r"and no GGUF: name the model's folder, model$"),
        ("run/run.json", r"and no GGUF: name the model's folder, run/model$"),
        ("open/model", r"is a part of a run that has not finished"),
        ("texts", r"no config\.json; it is a folder of text"),
        ("texts/a.txt/b", r"no such model, it is below texts/a\.txt, which is no folder"),
        ("absent/model.safetensors", r"no such model\. Give"),
        ("file:///model", r"no such model; give the path alone: /model\. Give"),
        ("model,run", r"no such model; separate names by spaces: model run\. Give"),
        ("mod*", r"no such model; only --input takes patterns"),
    ],
)
def test_what_stands_for_something_else_is_told_with_the_option(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of these is asked for on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    _touch(*(Path(each) for each in ("model/model.safetensors", "run/model/model.safetensors")))
    for folder in (Path("model"), Path("run/model")):
        (folder / "config.json").write_text('{"model_type": "llama"}')
    for folder in (Path("run"), Path("open")):
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text('{"command": "cpt"}')
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("x")
    with pytest.raises(InputError, match=f"^--teacher.*{message}"):
        resolve_model(name, option="--teacher")


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("https://huggingface.co/some/model", "some/model"),
        ("https://huggingface.co/some/model/tree/main", "some/model"),
        ("hf.co/some/model/", "some/model"),
        ("hf://some/model", "some/model"),
        ("https://huggingface.co/some/model/blob/step3000/config.json", "some/model@step3000"),
        ("https://huggingface.co/some/model?library=transformers", "some/model"),
    ],
)
def test_the_address_of_a_page_is_answered_with_the_hub_id(page: str, name: str) -> None:
    with pytest.raises(InputError, match=f"name the model by its hub id: --source {name}$"):
        resolve_model(page, option="--source")
    with pytest.raises(InputError, match=f"name the tokenizer by its hub id: {name}$"):
        load_tokenizer(page)
    assert is_hub_id(name)


def test_a_folder_of_the_hubs_cache_names_its_newest_state(tmp_path: Path) -> None:
    cached = tmp_path / "models--some--model"
    states = [cached / "snapshots" / name for name in ("aaa", "bbb")]
    _touch(*(state / "config.json" for state in states), cached / "refs" / "main")
    for content, state in (("aaa", states[0]), ("gone", states[1])):
        (cached / "refs" / "main").write_text(content)
        with pytest.raises(InputError, match=f"in {state}: name that one"):
            resolve_model(cached)
        with pytest.raises(InputError, match=f"name the model in it, {state}$"):
            load_tokenizer(cached)


def test_several_checkpoints_are_named_by_their_number(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000", "final"):
        _touch(tmp_path / name / "config.json")
    with pytest.raises(InputError, match="folders final, checkpoint-500 and checkpoint-1000 do"):
        resolve_model(tmp_path)


def test_hidden_notes_about_a_gguf_file_are_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _touch(tmp_path / "m.gguf", tmp_path / "._m.gguf")
    monkeypatch.setattr(sources, "convert_gguf", lambda path, _: path)
    assert resolve_model(tmp_path) == tmp_path / "m.gguf"


def test_a_folder_that_hides_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta-llama").mkdir()
    with pytest.raises(InputError) as caught:
        resolve_model("meta-llama/Llama-2-7b-hf")
    assert "the folder meta-llama/ in this working folder" in str(caught.value)
    assert "hf download meta-llama/Llama-2-7b-hf" in str(caught.value)


def test_offline_the_advice_is_not_to_download_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(InputError) as caught:
        resolve_model("some/model")
    message = str(caught.value)
    assert "HF_HUB_OFFLINE forbids to ask the hub (unset it to download)" in message
    assert "fetch it, on a machine that may use the network" in message


@pytest.mark.parametrize(
    ("name", "revision", "folder"),
    [
        ("some/model@step3000", "step3000", "models/model-step3000"),
        ("some/model@refs/pr/1", "refs/pr/1", "models/model-refs-pr-1"),
        ("some/model", None, "models/model"),
    ],
)
def test_a_revision_reaches_the_hub_and_the_advice(
    name: str,
    revision: str | None,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def download(bare: str, revision: str | None, **_: object) -> str:
        asked.append((bare, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    _touch(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert resolve_model(name) == tmp_path
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(InputError):  # an empty file
        load_tokenizer(name)
    assert asked == [("some/model", revision)] * 2

    def refuse(*_: object, **__: object) -> str:
        # Its arguments differ between versions of huggingface_hub.
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for call in (resolve_model, load_tokenizer):
        with pytest.raises(InputError) as caught:
            call(name)
        flag = f" --revision {revision}" if revision else ""
        assert f"hf download some/model{flag} --include" in str(caught.value)
        assert "huggingface.co/some/model@" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        resolve_model(name)
    assert f"has no branch, tag or commit {revision!r} of it" in str(caught.value)
    assert str(caught.value).endswith(f"then give --model {folder}")


@pytest.mark.parametrize("part", [".", "checkpoints", "checkpoints/step-00000002"])
def test_what_a_run_holds_besides_its_model_is_named(part: str, tmp_path: Path) -> None:
    _touch(tmp_path / "run.json", tmp_path / "checkpoints" / "step-00000002" / "COMMITTED")
    with pytest.raises(InputError, match=r"--source .*of a run that has not finished, so"):
        resolve_model(tmp_path / part, option="--source")
    _touch(tmp_path / "model" / "config.json", tmp_path / "model" / "model.safetensors")
    if part == ".":
        assert resolve_model(tmp_path) == tmp_path / "model"
    else:
        with pytest.raises(InputError, match=r"is no model; the run's model is .*/model$"):
            resolve_model(tmp_path / part)


def test_a_home_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="without `~`"):
        resolve_model("~nobody-of-that-name/model")


def test_without_weights_only_small_files_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(
        name: str, allow_patterns: list[str], local_files_only: bool = False, **_: object
    ) -> str:
        if not local_files_only:
            asked.append(allow_patterns)
            _touch(tmp_path / "config.json", tmp_path / "tokenizer.json")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("some/model", weights=False) == tmp_path
    assert resolve_model("some/model", weights=False) == tmp_path
    assert len(asked) == 1 and "*.json" in asked[0]
    assert not any("safetensors" in pattern for pattern in asked[0])


def test_a_cache_that_lacks_a_shard_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, local_files_only: bool = False, **_: object) -> str:
        if not local_files_only:
            _touch(tmp_path / "b.safetensors")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    _touch(tmp_path / "config.json", tmp_path / "a.safetensors")
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert resolve_model("some/model") == tmp_path
    assert (tmp_path / "b.safetensors").exists()


def test_the_local_hub_cache_is_used_before_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(name: str, local_files_only: bool = False, **_: object) -> str:
        calls.append(local_files_only)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    _touch(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert resolve_model("some/model") == tmp_path
    assert calls == [True]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        resolve_model("some/model")
    assert calls == [True, True, False]


def test_missing_gguf_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    _touch(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"pip install gguf accelerate"):
        resolve_model(str(tmp_path))


def test_a_damaged_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match="cannot convert"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
def test_a_real_gguf_file_becomes_a_model_folder(tmp_path: Path, gguf_file: Path) -> None:
    output = convert_gguf(gguf_file, tmp_path / "model")
    assert output == tmp_path / "model" and (output / "tokenizer.json").is_file()
    changed = (output / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(gguf_file, output) == output
    assert (output / "model.safetensors").stat().st_mtime_ns == changed
    model = load_model(output)
    assert model.config.num_parameters() == 134_515_008
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_a_conversion_finished_by_another_process_is_kept(tmp_path: Path) -> None:
    _touch(tmp_path / "mine" / "config.json", tmp_path / "model" / "config.json")
    (tmp_path / "model" / "config.json").write_text("theirs")
    sources._publish(tmp_path / "mine", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "theirs"
    _touch(tmp_path / "other" / "file")
    with pytest.raises(OSError, match="other"):
        sources._publish(tmp_path / "mine", tmp_path / "other")
