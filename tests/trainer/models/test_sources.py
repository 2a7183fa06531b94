from pathlib import Path

import pytest
import torch

from data.errors import InputError
from tests.trainer.models.cases import gguf_wheel
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
    with pytest.raises(InputError, match=r"does not exist.*config\.json"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    _touch(tmp_path / "config.json", tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin.*save_pretrained"):
        resolve_model(str(tmp_path))
    _touch(tmp_path / "two" / "a.gguf", tmp_path / "two" / "b.gguf")
    with pytest.raises(InputError, match=r"2 \.gguf files"):
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
    assert "no connection" in message
    assert "hf download meta-llama/Llama-2-7b-hf --local-dir models/Llama-2-7b-hf" in message
    assert "--source" in message


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
    with pytest.raises(InputError, match=r"gguf and accelerate.*shorn\[demo\]"):
        resolve_model(str(tmp_path), converted=tmp_path / "out")


def test_a_damaged_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match="cannot convert"):
        resolve_model(str(tmp_path / "m.gguf"), converted=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
def test_a_real_gguf_file_becomes_a_model_folder(tmp_path: Path) -> None:
    folder = gguf_wheel()
    output = resolve_model(str(folder), converted=tmp_path / "model")
    assert output == tmp_path / "model" and (output / "tokenizer.json").is_file()
    changed = (output / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(next(folder.glob("*.gguf")), output) == output
    assert (output / "model.safetensors").stat().st_mtime_ns == changed
    model = load_model(output)
    assert model.config.num_parameters() == 134_515_008
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()
