"""GGUF files: what they hold is the model, and other programs compute what it computes."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import InputError
from launch.export import checks
from launch.export import gguf_file as writing
from launch.export import run as exporting
from launch.export.__main__ import main
from launch.export.architecture import tensors_of
from launch.export.gguf_file import made_of, read_tensors
from tests.factories import write_model, write_tokenizer
from tests.trainer.models.cases import CASES, hf_config
from tests.trainer.models.test_uneven import fields_of
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_model, save_model
from trainer.models.layer_sizes import LayerSizes

pytest.importorskip("gguf", reason="needs gguf (pip install 'shorn[export]')")
CAN_BE = sorted(set(CASES) - {"qwen3-biases"})
VOCABULARY = 261
LLAMA_CPP = find_spec("xllamacpp") is not None


def write_case(path: Path, name: str, sizes: tuple[LayerSizes, ...] | None = None) -> CausalLM:
    """A random model of a case, with rows for the ids of the tests' tokenizer."""
    values = json.loads(hf_config(name).to_json_string())
    config = ModelConfig.from_hf(values | {"vocab_size": VOCABULARY})
    if sizes is not None:
        config = ModelConfig(**fields_of(config, sizes))
    model = CausalLM(config)
    init_weights(model, std=0.2)
    tokenizer = mergeable(write_tokenizer(path.parent / "tokenizer"))
    pairs = {name: tensor.detach() for name, tensor in model.named_parameters()}
    save_model(config, pairs, path, tokenizer_from=tokenizer)
    return model.eval()


def mergeable(folder: Path) -> Path:
    """The tests' tokenizer with two merges, without which llama.cpp reads none."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {"th": VOCABULARY - 2, "the": VOCABULARY - 1}
    content["model"]["merges"] = [["t", "h"], ["th", "e"]]
    file.write_text(json.dumps(content))
    return folder


def export(model: Path, output: Path, *words: str) -> list[dict[str, Any]]:
    file = output.parent / "export.json"
    main([str(model), "--output", str(output), "--json", str(file), "--threads", "1", *words])
    found: list[dict[str, Any]] = json.loads(file.read_text())["files"]
    return found


@pytest.mark.parametrize("name", CAN_BE)
def test_other_programs_compute_the_same(name: str, tmp_path: Path) -> None:
    write_case(tmp_path / "model", name)
    (entry,) = export(tmp_path / "model", tmp_path / "out", "--to", "gguf-f32")
    assert entry["tensors"]["largest_rounding"] == 0
    # transformers' reader of such files knows neither these families nor these settings.
    unread = ("gpt_neox", "llama-3-rope", "llama-linear-rope", "mistral-window", "qwen3")
    assert (entry["transformers"] is None) == name.startswith(unread)
    if entry["transformers"] is not None:
        assert entry["transformers"]["largest_difference"] < 1e-4
    if LLAMA_CPP:
        seen = entry["llama_cpp"]
        # llama.cpp has no sliding window, which is said.
        alike = name != "mistral-window"
        assert (seen["same_greedy"] == seen["of"]) is alike and seen["of"] > 3
        assert (seen["largest_difference_nats"] < 0.1) is alike


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_blocks_of_unlike_sizes(name: str, tmp_path: Path) -> None:
    """A block without attention, one without channels, and one of its own widths."""
    sizes = (LayerSizes(0, 0, 64), LayerSizes(6, 2, 80), LayerSizes(3, 1, 0))
    write_case(tmp_path / "model", name, sizes)
    (entry,) = export(tmp_path / "model", tmp_path / "out", "--to", "gguf-f32")
    assert entry["architecture"] == "deci" and entry["transformers"] is None
    if LLAMA_CPP:
        assert entry["llama_cpp"]["same_greedy"] == entry["llama_cpp"]["of"]
        assert entry["llama_cpp"]["largest_difference_nats"] < 0.05


def test_every_type_holds_what_it_can(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    kinds = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0")
    output = tmp_path / "out"
    found = export(folder, output, "--check", "tensors", "--to", *(f"gguf-{k}" for k in kinds))
    rounding = [entry["tensors"]["largest_rounding"] for entry in found]
    limits = [0, 2**-11, 2**-8, 1 / 200, 1 / 15, 1 / 7]
    assert all(own <= limit for own, limit in zip(rounding, limits, strict=True))
    sizes = [entry["bytes"] for entry in found]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] > sizes[4] > sizes[5]
    model = load_model(folder)
    for entry, kind in zip(found, kinds, strict=True):
        path = Path(entry["path"])
        assert path == output / f"model-{kind}.gguf" and made_of(path) is not None
        own = made_of(path)
        assert own is not None and own["type"] == kind
        # What is looked up by ids, and what predicts them, keeps eight bits.
        stored = dict(read_tensors(path))
        embedding = dict(tensors_of(model))["token_embd.weight"].detach()
        apart = (torch.from_numpy(stored["token_embd.weight"]) - embedding).abs().max()
        assert apart <= embedding.abs().max() / 200
    # A second start writes nothing again.
    times = [Path(entry["path"]).stat().st_mtime_ns for entry in found]
    again = export(folder, output, "--check", "tensors", "--to", *(f"gguf-{k}" for k in kinds))
    assert again == found
    assert [Path(entry["path"]).stat().st_mtime_ns for entry in found] == times


def test_a_runs_model_is_called_after_the_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "small" / "model")
    (tmp_path / "small" / "cpt.json").write_text("{}")
    (entry,) = export(tmp_path / "small", tmp_path / "out", "--check", "tensors")
    assert Path(entry["path"]).name == "small-f16.gguf"
    (entry,) = export(folder, tmp_path / "out", "--check", "tensors", "--name", "own")
    assert Path(entry["path"]).name == "own-f16.gguf"


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    output = tmp_path / "out"
    folder = write_model(tmp_path / "model", intermediate_size=72)
    with pytest.raises(InputError, match=r"gguf-q8_0: ffn 72 is no multiple of 32"):
        export(folder, output, "--to", "gguf-f16", "gguf-q8_0")
    write_case(tmp_path / "biased", "qwen3-biases")
    with pytest.raises(InputError, match="qwen3 with biases in attention"):
        export(tmp_path / "biased", output)
    write_case(tmp_path / "uneven", "qwen2", (LayerSizes(6, 2, 80),) * 2 + (LayerSizes(6, 2, 9),))
    with pytest.raises(InputError, match=r"blocks of unlike sizes: .*none that computes as qwen2"):
        export(tmp_path / "uneven", output)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="splits text by WhitespaceSplit in a way"):
        export(folder, output)
    with pytest.raises(InputError, match="is the model's own folder"):
        export(folder, folder)
    assert not list(tmp_path.rglob("*.gguf"))


def test_other_files_stay(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model-f16.gguf").write_bytes(b"GGUF of somebody")
    folder = write_model(tmp_path / "model")
    words = ("--check", "tensors")
    with pytest.raises(InputError, match="is no file that this command has written"):
        export(folder, output, *words)
    export(folder, tmp_path / "mine", *words)
    write_model(tmp_path / "model", initializer_range=0.05)
    with pytest.raises(InputError, match="was made of another model, or before this one changed"):
        export(folder, tmp_path / "mine", *words)
    export(folder, tmp_path / "again", *words)
    (folder / "chat_template.jinja").write_text("{{ 'new' }}")
    with pytest.raises(InputError, match="before this one changed"):
        export(folder, tmp_path / "again", *words)
    assert (output / "model-f16.gguf").read_bytes() == b"GGUF of somebody"


def test_weights_beyond_f16_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1e8
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"gguf-f16: the weights reach .*use --to gguf-bf16"):
        export(tmp_path / "model", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf*"))


def test_damage_on_the_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words = write_model(tmp_path / "model"), ("--check", "tensors")
    (entry,) = export(folder, tmp_path / "out", *words)
    file = Path(entry["path"])
    content = bytearray(file.read_bytes())
    content[-100] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(InputError, match="or other values: delete it, and run"):
        export(folder, tmp_path / "out", *words)
    file.unlink()
    # A disk that is full, of which NumPy does not tell.
    whole = writing.write

    def cut(plan: Any, path: Path, *rest: Any) -> None:
        whole(plan, path, *rest)
        with path.open("r+b") as stream:
            stream.truncate(30_000)

    monkeypatch.setattr(exporting, "write", cut)
    with pytest.raises(InputError, match=r"came out with what cannot be read .*is not kept"):
        export(folder, tmp_path / "out", *words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_file_that_others_read_otherwise_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model")
    monkeypatch.setitem(checks.EXACT, "f16", 0.0)
    with pytest.raises(InputError, match=r"more than f16 explains .*the file is not kept"):
        export(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
