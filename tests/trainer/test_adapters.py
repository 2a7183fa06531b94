"""Adapters in peft's form: peft loads them onto transformers' own model and computes the same."""

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from data.errors import InputError
from tests.trainer.models.cases import pair
from tests.trainer.models.test_lora import IDS, MODELS, trained_adapters
from trainer import parallel
from trainer.adapters import merged_tensors, require_peft, write_adapter
from trainer.finetune_config import LoraOptions
from trainer.models.decoder import CausalLM, LossOutput
from trainer.models.hf import load_model, save_model
from trainer.models.lora import adapters_of, targets_of

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(
        f"{folder}/base", trust_remote_code=True, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
    with torch.no_grad():
        torch.save(model(torch.load(f"{folder}/ids.pt")).logits, f"{folder}/logits.pt")
assert not [name for name in sys.modules if name.startswith("trainer.")]
"""
"""Run by plain Python: peft and transformers alone."""


def base_of(model: CausalLM, path: Path) -> Path:
    """The folder of the model without its adapters."""
    pairs = {
        name: tensor.detach()
        for name, tensor in model.named_parameters()
        if not name.endswith((".lora_a", ".lora_b"))
    }
    save_model(model.config, pairs, path)
    return path


def write(model: CausalLM, path: Path, base: Path, targets: tuple[str, ...]) -> dict[str, Any]:
    write_adapter(
        model,
        parallel.init(threads=1),
        path,
        base=base,
        named=str(base),
        options=LoraOptions(r=3, alpha=1.5, dropout=0.1),
        targets=targets,
    )
    found: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return found


def test_peft_computes_the_same_logits(tmp_path: Path) -> None:
    """For every family, biases, tied heads, and blocks that differ; the merged folder too."""
    pytest.importorskip("peft")
    wanted = {name: prepare(name, tmp_path / name) for name in MODELS}
    folders = [str(tmp_path / name) for name in MODELS]
    subprocess.run([sys.executable, "-c", PLAIN, *folders], check=True, timeout=120, cwd=tmp_path)
    for name, logits in wanted.items():
        folder = tmp_path / name
        with torch.no_grad():
            merged = load_model(folder / "merged")(torch.load(folder / "ids.pt"))
        near = 1e-5 * logits.abs().max().item()
        for found in (torch.load(folder / "logits.pt"), merged):
            assert torch.allclose(found, logits, rtol=1e-5, atol=near), name


def prepare(name: str, folder: Path) -> torch.Tensor:
    """Writes a base, its adapter, the merged model and ids; returns our logits."""
    model = trained_adapters(name)
    trained = [own for own, parameter in model.named_parameters() if parameter.requires_grad]
    layers = tuple({own.split(".")[-2] for own in trained})
    settings = write(model, folder / "adapter", base_of(model, folder / "base"), layers)
    assert settings["base_model_name_or_path"] == str(folder / "base")
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 1.5, 0.1)
    assert settings["target_modules"] == sorted(layers)
    save_model(model.config, merged_tensors(model), folder / "merged")
    ids = IDS % model.config.vocab_size
    torch.save(ids, folder / "ids.pt")
    with torch.no_grad():
        logits = model(ids)
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gpt_neox"])
def test_gradients_are_those_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    model, reference = trained_adapters(name), pair(name)[1]
    targets = list(targets_of(model.config, ()))
    settings = peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=targets)
    theirs = dict(peft.get_peft_model(reference, settings).named_parameters())
    factors = {
        f"base_model.model.{layer}.lora_{letter}.default.weight": factor
        for layer, adapted in adapters_of(model)
        for letter, factor in (("A", adapted.lora_a), ("B", adapted.lora_b))
    }
    with torch.no_grad():
        for own, factor in factors.items():
            theirs[own].copy_(factor)
    shifted = IDS.roll(-1, 1)
    output = model(IDS, targets=shifted)
    assert isinstance(output, LossOutput)
    output.loss.backward()
    logits = reference(IDS).logits
    cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum").backward()
    assert {own for own, parameter in theirs.items() if parameter.grad is not None} == set(factors)
    for own, factor in factors.items():
        assert factor.grad is not None
        scale = factor.grad.abs().max().item()
        torch.testing.assert_close(theirs[own].grad, factor.grad, rtol=1e-5, atol=1e-5 * scale)


def test_an_adapter_is_replaced_whole(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = trained_adapters("llama", targets=("q_proj",))
    base = base_of(model, tmp_path / "base")
    write(model, tmp_path / "adapter", base, ("q_proj",))
    first = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter" / "README.md").write_text("of another")
    write(model, tmp_path / "adapter", base, ("q_proj",))
    found = {path.name: path for path in (tmp_path / "adapter").iterdir()}
    assert set(found) == {"adapter_config.json", "adapter_model.safetensors"}
    assert found["adapter_model.safetensors"].read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_adapter_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = trained_adapters("llama", targets=("q_proj",))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^cannot write \S*/file/adapter: "):
        write(model, tmp_path / "file" / "adapter", tmp_path, ("q_proj",))


def test_the_commit_of_a_hub_model_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = trained_adapters("llama", targets=("q_proj",))
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    write_adapter(
        model,
        parallel.init(threads=1),
        tmp_path / "adapter",
        base=snapshot,
        named="acme/tiny@main",
        options=LoraOptions(),
        targets=("q_proj",),
    )
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "acme/tiny"
    assert settings["revision"] == "a" * 40


def test_a_missing_package_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"peft, .*No module named 'peft'.*pip install -e '\.\[lo"):
        require_peft()
