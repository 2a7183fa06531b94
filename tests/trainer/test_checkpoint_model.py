"""A checkpoint as a model: the weights that the run had, and what cannot be read as one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from tests.trainer.tiny import SHAPE, options, pretrain
from trainer.checkpoint_files import committed
from trainer.checkpoint_model import _shape, load_step, read_step
from trainer.identity import run_identity
from trainer.models.hf import load_model
from trainer.models.layer_sizes import LayerSizes

CPU = torch.device("cpu")


@pytest.fixture
def run(workspace: Path, tmp_path: Path) -> Path:
    train = options(steps=5, save_interval=2, keep_all_checkpoints=True)
    pretrain(train, model=workspace / "model", data=workspace / "tokens", output=tmp_path / "run")
    return tmp_path / "run"


def test_all_checkpoints_stay_and_the_last_is_the_model(run: Path) -> None:
    found = [read_step(path) for path in committed(run / "checkpoints")]
    assert [saved.step for saved in found] == [2, 4, 5]
    assert [saved.tokens for saved in found] == [saved.step * 8 * 16 for saved in found]
    assert len({saved.weights for saved in found}) == 3
    final = dict(load_model(run / "model").named_parameters())
    for saved, same in zip(found, (False, False, True), strict=True):
        own = dict(load_step(saved, CPU, torch.float32).named_parameters())
        assert own.keys() == final.keys()
        assert all(torch.equal(own[name], final[name]) for name in final) is same
    half = load_step(found[-1], CPU, torch.bfloat16)
    for name, parameter in half.named_parameters():
        torch.testing.assert_close(parameter, final[name].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"family": "qwen3", "qk_norm": True, "tie_embeddings": False},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window": 8},
        {"layer_sizes": (LayerSizes(4, 2, 24), LayerSizes(0, 0, 12))},
    ],
)
def test_what_a_run_notes_of_its_model_is_the_model(changes: dict[str, Any]) -> None:
    shape = replace(SHAPE, **changes)
    noted = json.loads(json.dumps(run_identity(options(), shape, precision="fp32", data="d")))
    assert _shape(noted, Path("step")) == replace(shape, hf={})


def test_what_is_no_model_is_refused(run: Path, tmp_path: Path) -> None:
    path = committed(run / "checkpoints")[0]
    marker = json.loads((path / "COMMITTED").read_text())

    def changed(**values: object) -> None:
        (path / "COMMITTED").write_text(json.dumps(marker | values))

    changed(run=marker["run"] | {"command": "shear"})
    with pytest.raises(InputError, match="of a run of shearing, whose model is what its masks"):
        read_step(path)
    changed(run=marker["run"] | {"command": "finetune", "method": "lora"})
    with pytest.raises(InputError, match="fine-tuning by lora, which holds what is trained alone"):
        read_step(path)
    changed(run=marker["run"] | {"command": "finetune", "method": "full"})
    assert read_step(path).step == 2
    changed(run=None)
    with pytest.raises(InputError, match="did not note what its model is"):
        read_step(path)
    changed(run=marker["run"] | {"model.num_heads": 3})
    with pytest.raises(InputError, match=r"does not say what its model is \(num_heads 3"):
        read_step(path)
    changed(run=marker["run"] | {"model.intermediate_size": 24})
    with pytest.raises(InputError, match=r"holds model\..* with the sizes"):
        load_step(read_step(path), CPU, torch.float32)
    changed()
    saved = read_step(path)
    shard = next(path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"SHA-256 is .*the file is damaged"):
        load_step(saved, CPU, torch.float32)
    shutil.rmtree(path)
    with pytest.raises(InputError, match="was removed meanwhile"):
        load_step(saved, CPU, torch.float32)
