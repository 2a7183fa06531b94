"""What is written loads in transformers 4 too, with the same logits.

Needs such a version beside the installed one:

    pip install --target FOLDER --no-deps transformers==4.57.6 'huggingface_hub<1' 'tokenizers<0.23'
    SHORN_TRANSFORMERS_4=FOLDER pytest -m slow tests/trainer/models/test_transformers_4.py
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.factories import write_tokenizer
from tests.pruner.test_extract import MODELS, NEOX_MODELS
from tests.trainer.models.cases import CASES, NEOX_CASES
from tests.trainer.models.test_uneven import uneven
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_config, load_model, save_model

BESIDE = os.environ.get("SHORN_TRANSFORMERS_4")
# Published folders say the base in these words.
BASES = {name: {"rotary_emb_base": 70_000} for name in NEOX_CASES}
READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
found = {}
for folder in sys.argv[2:]:
    # Models of uneven blocks bring their class along.
    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype="auto", trust_remote_code="uneven" in folder
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        logits = model.eval()(ids).logits.float()
    found[folder] = {
        "logits": logits,
        "dtype": str(next(model.parameters()).dtype),
        "ids": tokenizer("a <s> b").input_ids,
        "special": tokenizer.all_special_tokens,
        "templates": tokenizer.chat_template,
    }
torch.save(found, sys.argv[1])
"""


def written(name: str, source: Path, path: Path, dtype: torch.dtype) -> Path:
    """The folder of a model of one of CASES, from a config.json as transformers 4 writes it."""
    values = deepcopy(CASES[name]) | BASES.get(name, {"rope_theta": 500_000})
    model = CausalLM(ModelConfig.from_hf(values))
    init_weights(model, std=0.3, seed=1)
    save_model(model.config, model.state_dict(), path, tokenizer_from=source, dtype=dtype)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as transformers 5 writes it, with added tokens and two chat templates."""
    folder = write_tokenizer(tmp_path_factory.mktemp("source"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>", "<y>"]})
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "T"}
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_both_names_of_a_setting_say_the_same(name: str, source: Path, tmp_path: Path) -> None:
    folder = written(name, source, tmp_path / "model", torch.float32)
    values = json.loads((folder / "config.json").read_text())
    rope = values["rope_parameters"]
    if name in NEOX_CASES:
        assert (values["rotary_emb_base"], rope["rope_theta"]) == (70_000, 70_000)
        assert values["rotary_pct"] == rope["partial_rotary_factor"]
    else:
        assert (values["rope_theta"], rope["rope_theta"]) == (500_000, 500_000)
    scaling = values["rope_scaling"] or {"rope_type": "default"}
    assert scaling == {key: rope[key] for key in scaling}
    assert values["torch_dtype"] == values["dtype"] == "float32"
    # Neither form is needed for the other: the reader of transformers 5 takes both as one.
    assert load_config(folder).rope_theta == rope["rope_theta"]
    for missing in ({"rope_parameters"}, {"rope_theta", "rope_scaling", "rotary_emb_base"}):
        (folder / "config.json").write_text(
            json.dumps({key: values[key] for key in values if key not in missing})
        )
        parameters = AutoConfig.from_pretrained(folder).rope_parameters
        assert parameters == rope, missing


def test_a_tokenizer_of_transformers_5_is_widened(source: Path, tmp_path: Path) -> None:
    folder = written("llama", source, tmp_path / "model", torch.float32)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["additional_special_tokens"] == ["<x>", "<y>"]
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template == before.chat_template and len(after.chat_template) == 2
    assert after("a <x> b").input_ids == before("a <x> b").input_ids


@pytest.mark.slow
@pytest.mark.skipif(not BESIDE, reason="SHORN_TRANSFORMERS_4 names no transformers 4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_4_computes_the_same(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    folders = {name: written(name, source, tmp_path / name, dtype) for name in CASES}
    for name in ("llama-biases", "qwen2", "qwen3", "pythia", "sequential-tied"):
        model = uneven(**(MODELS | NEOX_MODELS)[name])
        folder = folders[f"uneven-{name}"] = tmp_path / f"uneven-{name}"
        state = model.state_dict()
        save_model(model.config, state, folder, tokenizer_from=source, dtype=dtype)
    output = tmp_path / "found.pt"
    command = [sys.executable, "-W", "ignore", "-c", READER, str(output)]
    assert BESIDE is not None
    subprocess.run(
        [*command, *map(str, folders.values())],
        env=os.environ | {"PYTHONPATH": BESIDE, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
    )
    ids = torch.arange(40).reshape(2, 20)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, folder in folders.items():
        found = torch.load(output)[str(folder)]
        with torch.no_grad():
            plain = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits.float()
            own = load_model(folder, dtype=dtype)(ids).float()
        scale = plain.norm()
        limit = 1e-6 if dtype == torch.float32 else 0.03
        assert (found["logits"] - plain).norm() / scale < limit, name
        assert (own - plain).norm() / scale < limit, name
        assert found["dtype"] == str(dtype), name
        assert found["ids"] == tokenizer("a <s> b").input_ids, name
        assert set(found["special"]) == set(tokenizer.all_special_tokens), name
        assert found["templates"] == tokenizer.chat_template, name
