"""Damaged model folders are refused by name, or read as transformers reads them."""

import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.errors import InputError
from data.tokenizers import load_tokenizer
from tests.factories import write_tokenizer
from tests.trainer.models.cases import hf_config
from tests.trainer.models.mutations import mutate_file
from trainer.models.export import require_loadable
from trainer.models.hf import check_weights, load_config, load_model, save_model
from trainer.models.sources import resolve_model, weights_fingerprint

IDS = torch.arange(20).reshape(1, 20)
NAMES = ("llama-3-rope", "mistral-window", "qwen2-tied", "qwen3", "gpt_neox")
FILES = {
    "config.json": "5GB",
    "generation_config.json": "5GB",
    "tokenizer_config.json": "5GB",
    "tokenizer.json": "5GB",
    "model.safetensors": "5GB",
    "model.safetensors.index.json": "40KB",
}


def read(path: Path) -> Tensor:
    """Everything that a command does with a model folder; the logits."""
    folder = resolve_model(path)
    config = load_config(folder)
    require_loadable(config, folder)
    check_weights(folder, config)
    weights_fingerprint(folder)
    load_tokenizer(folder).record()
    model = load_model(folder)
    logits: Tensor = model(IDS)
    target = path.with_name("out")
    save_model(config, model.state_dict(), target, tokenizer_from=folder)
    assert torch.equal(load_model(target)(IDS), logits)
    return logits


def check_damages(name: str, file: str, path: Path, seeds: range) -> dict[str, int]:
    """How many damages of `file` were refused, and how many read."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(hf_config(name)).eval()
    reference.save_pretrained(path, max_shard_size=FILES[file])
    (path / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 0.9}')
    write_tokenizer(path)
    original = (path / file).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little") if file == "model.safetensors" else None
    expected, counts = read(path), {"refused": 0, "read": 0}
    for seed in seeds:
        mutate_file(path / file, original, random.Random(f"{name} {file} {seed}"), header)
        started = time.monotonic()
        try:
            found = read(path)
        except InputError as error:
            assert str(path) in str(error) and len(str(error)) < 1500, (name, file, seed, error)
            counts["refused"] += 1
        else:
            if file == "config.json":
                plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                expected = plain(IDS).logits
            assert (found - expected).norm() <= 1e-4 * expected.norm(), (name, file, seed)
            counts["read"] += 1
        assert time.monotonic() - started < 10, (name, file, seed)
    return counts


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_refused_or_read(file: str, tmp_path: Path) -> None:
    counts = check_damages("llama-3-rope", file, tmp_path / "model", range(8))
    assert counts["refused"] >= (1 if file == "generation_config.json" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files_are_refused_or_read(name: str, file: str, tmp_path: Path) -> None:
    check_damages(name, file, tmp_path / "model", range(1000, 1040))
