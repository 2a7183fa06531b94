import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import InputError
from data.mixture import MixtureConfig
from pruner import run as run_module
from pruner.callback import ShearCallback
from pruner.config import MaskConfig, ShearConfig
from pruner.run import shear
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokens
from trainer.config import TrainConfig
from trainer.loop import Trainer
from trainer.models.hf import load_config

TARGET = "layers=2,hidden=24,heads=2,kv-heads=1,ffn=20"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a three-block model and a token folder of two domains."""
    root = tmp_path_factory.mktemp("inputs")
    model = write_model(root / "model", num_hidden_layers=3)
    write_tokens(root / "tokens", model, number=40)
    return root


def configure(inputs: Path, output: Path, **options: Any) -> ShearConfig:
    train: dict[str, Any] = {"steps": 8, "seq_len": 32, "global_batch": 4, "micro_batch": 2}
    train |= {"lr": 1e-3, "eval_sequences": 2, "precision": "fp32", "threads": 1}
    masks: dict[str, Any] = {"calibration_sequences": 6}
    for name in list(options):
        if name in TrainConfig.__dataclass_fields__:
            train[name] = options.pop(name)
        elif name in MaskConfig.__dataclass_fields__:
            masks[name] = options.pop(name)
    return ShearConfig(
        **{
            "source": str(inputs / "model"),
            "data": str(inputs / "tokens"),
            "output": str(output),
            "target": TARGET,
            "masks": MaskConfig(**masks),
            "train": TrainConfig(**train),
            **options,
        }
    )


def losses(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_writes_a_model_of_exactly_the_target_shape(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, json=str(tmp_path / "copy.json")))
    report = json.loads((output / "shear.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == report
    assert report["target"] == {
        "layers": 2,
        "hidden": 24,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "ffn": 20,
    }
    expected = {"hidden": [24], "layer": [2], "kv_group": [1] * 3, "intermediate": [20] * 3}
    assert report["kept"] == report["alive"] == expected
    assert report["polarised"] is True
    assert report["reload_difference"] <= 1e-5
    assert set(report["reference"]) == set(report["held_out"]) == {"alpha", "beta"}
    assert sum(report["weights"].values()) == pytest.approx(1.0)
    assert report["final_loss"] == losses(output)[-1]

    model = load_config(output / "model")
    sizes = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads)
    assert (*sizes, model.intermediate_size) == (2, 24, 2, 1, 20)
    assert model.num_parameters() == report["parameters"]["target"]
    masks = load_file(output / "masks.safetensors")
    assert masks["z.intermediate"].shape == (3, 48)
    assert masks["kept.hidden"].shape == (1, 24)
    assert torch.equal(masks["z.hidden"].nonzero()[:, 1], masks["kept.hidden"][0])

    capsys.readouterr()
    assert shear(configure(inputs, output)) is None
    assert "this run is finished" in capsys.readouterr().out


def test_a_stopped_run_resumes_without_measuring_again(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shear(configure(inputs, tmp_path / "straight"))
    original = ShearCallback.on_step_end

    def stop_after_four(self: ShearCallback, t: Trainer) -> None:
        original(self, t)
        if t.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(ShearCallback, "on_step_end", stop_after_four)
        stopped = shear(configure(inputs, tmp_path / "resumed"))
    assert stopped is not None and stopped.step == 4
    assert not (tmp_path / "resumed" / "model").exists()

    monkeypatch.delattr(run_module, "pretrained")
    monkeypatch.setattr(run_module, "measure_source", None)
    shear(configure(inputs, tmp_path / "resumed"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    for name in ("masks.safetensors", "model/model.safetensors"):
        expected = load_file(tmp_path / "straight" / name)
        found = load_file(tmp_path / "resumed" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_lost_measurements_are_refused_once_training_has_begun(
    inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output))
    (output / "shear.json").unlink()
    (output / "source.safetensors").unlink()
    with pytest.raises(InputError, match=r"source\.safetensors .* is missing or damaged"):
        shear(configure(inputs, output))


def test_a_run_cut_off_before_its_report_only_finishes(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output))
    before = json.loads((output / "shear.json").read_text())
    (output / "shear.json").unlink()
    shear(configure(inputs, output))
    after = json.loads((output / "shear.json").read_text())
    for name in ("final_loss", "held_out", "kept", "weights", "reference"):
        assert after[name] == before[name], name
    assert len(losses(output)) == 8


def test_another_target_does_not_resume(inputs: Path, tmp_path: Path) -> None:
    shear(configure(inputs, tmp_path / "out"))
    with pytest.raises(InputError, match=r"another configuration: target was .*ffn=20.*ffn=24"):
        shear(configure(inputs, tmp_path / "out", target=TARGET.replace("ffn=20", "ffn=24")))


def test_paper_rule_says_that_it_did_not_polarise(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shear(configure(inputs, tmp_path / "out", rule="paper", mixture=MixtureConfig(kind="fixed")))
    report = json.loads((tmp_path / "out" / "shear.json").read_text())
    assert report["polarised"] is False
    assert report["kept"]["intermediate"] == [20] * 3
    assert sum(report["kept_not_alive"].values()) > 0
    assert report["reload_difference"] <= 1e-5
    assert "warning: the masks did not polarise" in capsys.readouterr().out


def test_bf16_compute_and_16_bit_weights(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, precision="bf16", save_dtype="bfloat16", target="ffn=20"))
    report = json.loads((output / "shear.json").read_text())
    assert report["reload_difference"] < 0.05
    weights = load_file(output / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def shear_on_a_rank(inputs: Path, output: Path) -> None:
    shear(configure(inputs, output))


def test_two_ranks_learn_the_same_masks(inputs: Path, tmp_path: Path) -> None:
    run_ranks(shear_on_a_rank, 1, inputs, tmp_path / "one")
    run_ranks(shear_on_a_rank, 2, inputs, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one = load_file(tmp_path / "one" / "masks.safetensors")
    two = load_file(tmp_path / "two" / "masks.safetensors")
    assert all(torch.equal(two[name], one[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "heads=3"}, r"heads=3 is not a multiple of its 2 KV heads.*use heads=4"),
        ({"target": "1.3b"}, r"preset 1\.3b is made for LLaMA-2-7B"),
        ({"target": "depth=1"}, r"'depth=1' is neither a preset"),
        ({"source": "/nowhere/model"}, r"model '/nowhere/model' does not exist"),
        ({"data": "/nowhere/tokens"}, r"no tokenized data there.*python -m data\.tokenize"),
        ({"micro_batch": 3}, r"--micro-batch 3 does not divide"),
        ({"seq_len": 512}, r"--seq-len 512 is longer than the model's 256"),
        ({"domain_weights": "gamma=1"}, r"--domain-weights names \['gamma'\]"),
    ],
)
def test_bad_calls_fail_before_any_weight_is_read(
    options: dict[str, Any],
    message: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(run_module, "build_model")
    with pytest.raises(InputError, match=message):
        shear(configure(inputs, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
