"""The files that hold a model are those that transformers takes."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from data.errors import InputError
from data.log import logger
from tests.trainer.models.cases import hf_config
from trainer.models.hf import check_weights, load_config, load_model, save_model
from trainer.models.sources import resolve_model, weights_fingerprint
from trainer.models.weights import INDEX_FILE, weight_files

IDS = torch.arange(40).reshape(2, 20)


def folder_of(path: Path, name: str = "llama", shard: str = "5GB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(name))
    model.save_pretrained(path, max_shard_size=shard)
    return path


def same_as_transformers(path: Path) -> bool:
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return bool((load_model(path)(IDS) - plain(IDS).logits).abs().max() < 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "model_ema.safetensors",
        "pytorch_model.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "a.safetensors",
    ],
)
def test_other_files_beside_the_model_are_ignored_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(tmp_path / "model")
    before = weights_fingerprint(path)
    state = load_file(path / "model.safetensors")
    others = {key.removeprefix("model."): value + 0.5 for key, value in state.items()}
    kept = name in ("model_ema.safetensors", "pytorch_model.safetensors")
    save_file({key: value + 0.5 for key, value in state.items()} if kept else others, path / name)
    assert resolve_model(path) == path
    check_weights(path, load_config(path))
    assert same_as_transformers(path)
    assert weights_fingerprint(path) == before
    assert f"{name} ignored; the model is in model.safetensors" in capsys.readouterr().out


def test_a_single_file_comes_before_an_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(tmp_path / "model")
    other = folder_of(tmp_path / "other", shard="40KB")
    for file in other.glob("model*"):
        state = load_file(file) if file.suffix == ".safetensors" else {}
        if state:
            save_file({key: value + 1 for key, value in state.items()}, path / file.name)
        else:
            shutil.copy(file, path)
    assert weight_files(path) == [path / "model.safetensors"]
    assert same_as_transformers(path)
    assert f", {INDEX_FILE} ignored; the model is in model.safetensors" in capsys.readouterr().out
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    assert same_as_transformers(path)


def test_the_file_that_the_config_names_comes_first_and_is_not_named_on(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    state = load_file(path / "model.safetensors")
    save_file({key: value + 0.1 for key, value in state.items()}, path / "ema.safetensors")
    values = json.loads((path / "config.json").read_text())
    values["transformers_weights"] = "ema.safetensors"
    (path / "config.json").write_text(json.dumps(values))
    assert weight_files(path) == [path / "ema.safetensors"]
    assert same_as_transformers(path)
    model = load_model(path)
    save_model(model.config, model.state_dict(), tmp_path / "out", tokenizer_from=path)
    assert same_as_transformers(tmp_path / "out")
    values["transformers_weights"] = "../ema.safetensors"
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="not a file inside this folder"):
        weight_files(path)


def test_files_that_transformers_does_not_take_are_no_model(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    (path / "model.safetensors").rename(path / "model.fp16.safetensors")
    with pytest.raises(InputError, match=r"holds model\.fp16\.safetensors, but neither .* rename"):
        resolve_model(path)
    parts = folder_of(tmp_path / "parts", shard="40KB")
    (parts / INDEX_FILE).unlink()
    with pytest.raises(InputError, match=rf"-of-.* and others, but neither .*fetch {INDEX_FILE}"):
        weights_fingerprint(parts)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b"])
def test_an_index_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x")
    path = tmp_path / "model"
    path.mkdir()
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match=r"which model\.safetensors\.index\.json names"):
        weight_files(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "`weight_map` is missing"),
        ('{"weight_map": []}', "`weight_map` is a list"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"x": 5}}', "the file of x is a whole number"),
        ("\xef", "not valid JSON"),
        ('{"weight_map": {"x": "b", "y": "a"}}', "lacks a, b, which"),
    ],
)
def test_an_index_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        weight_files(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_shards_in_a_folder_and_links_are_followed(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model", shard="40KB")
    index = json.loads((path / INDEX_FILE).read_text())
    (path / "parts").mkdir()
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(path.glob("*.safetensors"))):
        if number % 2:
            file.rename(path / "parts" / file.name)
        else:
            file.rename(tmp_path / "blobs" / str(number))
            file.symlink_to(f"../blobs/{number}")
    for name, file in index["weight_map"].items():
        inner = (path / "parts" / file).exists()
        index["weight_map"][name] = f"parts/{file}" if inner else file
    (path / INDEX_FILE).write_text(json.dumps(index))
    assert same_as_transformers(path)


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt_neox-sequential"])
def test_a_model_saved_without_its_head_is_read(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModel.from_config(hf_config(name)).save_pretrained(tmp_path)
    assert "layers.0." in " ".join(load_file(tmp_path / "model.safetensors"))
    assert same_as_transformers(tmp_path)


def test_without_its_head_an_untied_model_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(hf_config("llama")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"stores no lm_head\.weight"):
        check_weights(tmp_path, load_config(tmp_path))


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model")
    state = load_file(path / "model.safetensors")
    save_file(state | {"lm_head.weight": state["lm_head.weight"].int()}, path / "model.safetensors")
    with pytest.raises(InputError, match="is of type I32"):
        check_weights(path, load_config(path))


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt_neox-sequential"])
def test_a_tied_matrix_that_is_stored_as_the_head_is_read(name: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model", name)
    state = load_file(path / "model.safetensors")
    config = load_config(path)
    names = config.traits.names
    state[f"{names.head}.weight"] = state.pop(f"{names.embedding}.weight")
    save_file(state, path / "model.safetensors", {"format": "pt"})
    assert same_as_transformers(path)


@pytest.mark.parametrize("name", ["llama", "llama-tied-head-dim"])
def test_a_model_with_another_head_is_named(name: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model", name)
    state = load_file(path / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state | {"score.weight": torch.ones(2, 48)}, path / "model.safetensors")
    values = json.loads((path / "config.json").read_text())
    values["architectures"] = ["LlamaForSequenceClassification"]
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"holds a LlamaForSequenceClassification .*another head"):
        check_weights(path, load_config(path))


@pytest.mark.parametrize(
    ("prefix", "extra", "message"),
    [
        ("_orig_mod.", "", r"all names begin with '_orig_mod\.'.*inner model"),
        ("", "model.layers.0.mlp.up_proj.weight_scale_inv", "weights are quantized.*original"),
        ("", "model.layers.0.mlp.up_proj.qweight", "weights are quantized"),
        ("", "model.layers.0.mlp.up_proj.scales", "weights are quantized"),
        ("", "model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter.*merge_and_unload"),
        ("", "v_head.summary.weight", "transformers would leave these out"),
    ],
)
def test_what_does_not_fit_gets_the_remedy_for_it(
    prefix: str, extra: str, message: str, tmp_path: Path
) -> None:
    path = folder_of(tmp_path / "model")
    state = {
        f"{prefix}{key}": value for key, value in load_file(path / "model.safetensors").items()
    }
    save_file(state | ({extra: torch.ones(2)} if extra else {}), path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        check_weights(path, load_config(path))


def test_an_index_that_names_the_wrong_file_is_the_one_to_blame(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "model", shard="40KB")
    index = json.loads((path / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(
        InputError, match=r"index\.json says that model\.norm\.weight is in model-0"
    ):
        check_weights(path, load_config(path))


def test_ignored_files_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder_of(tmp_path / "model")
    (path / "ema.safetensors").touch()
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lines.append)
    assert logger.isEnabledFor(logging.INFO)
    for _ in range(3):
        weight_files(path)
    assert len(lines) == 1
