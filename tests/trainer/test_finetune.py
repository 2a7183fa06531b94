"""Runs of fine-tuning: what is trained and written, and gone on with exactly."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data.errors import InputError
from tests.factories import write_model
from tests.trainer.test_cpt import stop_during
from tests.trainer.tiny import losses, options
from trainer.checkpoint_files import read_metadata
from trainer.config import DistillationConfig
from trainer.finetune import finetune, open_inputs, steps_of
from trainer.finetune_config import FinetuneConfig, LoraOptions
from trainer.loop import Trainer
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_model

METHODS = ("lora", "last-blocks", "full")
LORA = LoraOptions(r=4, dropout=0.2)


def configure(workspace: Path, output: Path, **changes: Any) -> FinetuneConfig:
    """Four quick steps with a checkpoint after each; changes of TrainConfig's fields and others."""
    quick = {"steps": 4, "save_interval": 1, "lr": 5e-2}
    train = {name: changes.pop(name) for name in list(changes) if name in TRAIN}
    settings: dict[str, Any] = {
        "model": str(workspace / "model"),
        "data": str(workspace / "tokens"),
        "output": str(output),
        "last_blocks": 1,
        "lora": LORA,
        "train": options(**(quick | train)),
    }
    return FinetuneConfig(**(settings | changes))


TRAIN = options().__dataclass_fields__


def tune(workspace: Path, output: Path, **changes: Any) -> Trainer | None:
    return finetune(configure(workspace, output, **changes), tensorboard=False)


def needs(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")


def logits(model: CausalLM | Any) -> torch.Tensor:
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        found = model(ids)
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_what_was_trained(method: str, workspace: Path, tmp_path: Path) -> None:
    needs(method)
    trainer = tune(workspace, tmp_path, method=method, save_dtype="float32")
    assert trainer is not None and trainer.step == 4
    report = json.loads((tmp_path / "finetune.json").read_text())
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert report["method"] == method and report["steps"] == 4
    assert report["trained_parameters"] == sum(p.numel() for p in trained.values())
    assert report["final_loss"] == losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert set(report["held_out"]) == {"alpha", "beta"}
    assert (tmp_path / "adapter").exists() == (method == "lora")
    wanted = logits(trainer.model)
    merged = load_model(tmp_path / "model")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    start = logits(load_model(workspace / "model"))
    assert (wanted - start).abs().max() > 1e-3
    assert not (tmp_path / "checkpoints").exists()
    # What is frozen is as it was.
    before, after = load_model(workspace / "model"), dict(merged.named_parameters())
    frozen = {n for n, p in trainer.model.named_parameters() if not p.requires_grad}
    adapted = {n.rpartition(".")[0] + ".weight" for n in trained if ".lora_" in n}
    for name in frozen - adapted:
        assert torch.equal(after[name], before.get_parameter(name)), name
    assert (method == "full") == (not frozen)


@pytest.mark.parametrize("method", METHODS)
def test_the_optimizer_holds_what_is_trained_alone(
    method: str, workspace: Path, tmp_path: Path
) -> None:
    needs(method)
    trainer = tune(workspace, tmp_path, method=method)
    assert trainer is not None
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {p for p in trainer.model.parameters() if p.requires_grad}
    assert held == trained == set(trainer.optimizer.state)
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    if method == "lora":
        assert all(".lora_" in name for name in names)
        assert len(names) == 2 * 7 * 2
    elif method == "last-blocks":
        # Embedding and head are tied in this model.
        assert {name.split(".layers.")[-1].split(".")[0] for name in names} == {"1", "model"}
        assert {"model.norm.weight", "model.embed_tokens.weight"} <= names


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune(workspace, whole, method=method)
    with monkeypatch.context() as patch:
        stop_during(2, patch)
        stopped = tune(workspace, parts, method=method)
    assert stopped is not None and stopped.stopping and len(losses(parts)) == 2
    assert not (parts / "finetune.json").exists()
    tune(workspace, parts, method=method)
    assert losses(parts) == losses(whole)
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(files) == (2 if method == "lora" else 1)
    for name in files:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_what_is_trained_and_no_more(
    method: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(method)
    with monkeypatch.context() as patch:
        stop_during(2, patch)
        trainer = tune(workspace, tmp_path, method=method)
    assert trainer is not None
    step = tmp_path / "checkpoints" / "step-00000002"
    held = read_metadata(step, [path.name for path in step.iterdir()]).state_dict_metadata
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    parts = {name for name, entry in held.items() if isinstance(entry, TensorStorageMetadata)}
    assert {name for name in parts if name.startswith("model.")} == {
        f"model.{name}" for name in trained
    }
    moments = {f"optimizer.state.{name}.{m}" for name in trained for m in ("exp_avg", "exp_avg_sq")}
    assert moments <= parts
    assert len(parts) == len(trained) * 4


def test_a_run_goes_on_from_its_own_base_only(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints hold no frozen weights, so these must be the same."""
    shutil.copytree(workspace / "model", tmp_path / "model")
    changes = {"model": str(tmp_path / "model"), "method": "last-blocks"}
    with monkeypatch.context() as patch:
        stop_during(2, patch)
        tune(workspace, tmp_path / "out", **changes)
    shutil.rmtree(tmp_path / "model")
    write_model(tmp_path / "model", workspace / "tokenizer", initializer_range=0.05)
    with pytest.raises(InputError, match="--model is another model"):
        tune(workspace, tmp_path / "out", **changes)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(workspace / "model", tmp_path / "model")
    trainer = tune(workspace, tmp_path / "out", **changes)
    assert trainer is not None and trainer.step == 4


def test_options_that_were_changed_are_named(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("lora")
    with monkeypatch.context() as patch:
        stop_during(2, patch)
        tune(workspace, tmp_path)
    for changes, message in (
        ({"lora": LoraOptions(r=8, dropout=0.2)}, "--lora-r was 4, now 8"),
        ({"lora": LoraOptions(r=4)}, "--lora-dropout was 0.2, now 0.05"),
        (
            {"lora": LoraOptions(r=4, dropout=0.2, target_modules=("q_proj",))},
            "--target-modules was 'q_proj k_proj .*', now 'q_proj'",
        ),
        ({"method": "full"}, r"configuration: --method was 'lora', now 'full'\. Repeat"),
        ({"method": "last-blocks"}, r": --method was 'lora', now 'last-blocks'\. Repeat"),
        ({"steps": 5}, "--steps was 4, now 5"),
        ({"seed": 5}, "--seed was 0, now 5"),
    ):
        with pytest.raises(InputError, match=message):
            tune(workspace, tmp_path, **changes)
    trainer = tune(workspace, tmp_path, lr=1e-3, micro_batch=4)
    assert trainer is not None and trainer.step == 4


def test_a_run_of_another_command_is_told_apart(workspace: Path, tmp_path: Path) -> None:
    from tests.trainer.tiny import pretrain

    tune(workspace, tmp_path / "tuned", method="full", steps=1)
    with pytest.raises(InputError, match="holds a finished run of fine-tuning"):
        pretrain(
            options(steps=1),
            model=workspace / "model",
            data=workspace / "tokens",
            output=tmp_path / "tuned",
        )
    pretrain(
        options(steps=1),
        model=workspace / "model",
        data=workspace / "tokens",
        output=tmp_path / "trained",
    )
    with pytest.raises(InputError, match="holds a finished run of continued pre-training"):
        tune(workspace, tmp_path / "trained", method="full", steps=1)


def test_a_finished_run_started_again_ends_well(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without its model and data, and with steps that only the data told."""
    shutil.copytree(workspace / "model", tmp_path / "model")
    shutil.copytree(workspace / "tokens", tmp_path / "tokens")
    changes = {"method": "full", "steps": 0, "epochs": 0.01, "save_interval": 0}
    trainer = tune(tmp_path, tmp_path / "out", **changes)
    assert trainer is not None and trainer.step == trainer.config.steps >= 1
    before = (tmp_path / "out" / "finetune.json").read_bytes()
    for gone in ("", "tokens", "model"):
        if gone:
            shutil.rmtree(tmp_path / gone)
        capsys.readouterr()
        assert tune(tmp_path, tmp_path / "out", **changes) is None
        assert "this run is finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "finetune.json").read_bytes() == before
    with pytest.raises(InputError, match="--seed was 0, now 3"):
        tune(tmp_path, tmp_path / "out", **changes, seed=3)
    with pytest.raises(InputError, match="--steps was"):
        tune(tmp_path, tmp_path / "out", method="full", steps=99)


def test_other_epochs_are_named(workspace: Path, tmp_path: Path) -> None:
    changes = {"method": "full", "steps": 0, "save_interval": 0}
    tune(workspace, tmp_path, epochs=0.02, **changes)
    with pytest.raises(InputError, match=r"--steps was .*\(--epochs 0\.5 takes \d+ steps\)"):
        tune(workspace, tmp_path, epochs=0.5, **changes)


def test_an_adapter_that_is_gone_is_missed(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("lora")
    tune(workspace, tmp_path)
    assert tune(workspace, tmp_path) is None
    assert "warning" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "adapter")
    assert tune(workspace, tmp_path) is None
    assert f"{tmp_path / 'adapter'} is gone: put it back" in capsys.readouterr().err


def test_what_was_tuned_can_be_tuned_again(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From training to adapters, and on: the losses before are carried along."""
    needs("lora")
    tune(workspace, tmp_path / "first", method="full")
    capsys.readouterr()
    tune(workspace, tmp_path / "second", model=str(tmp_path / "first"))
    printed = capsys.readouterr().out
    assert "the data begins at its start, with the 32 samples" in printed
    assert "held-out loss" in printed and "fine-tuned" in printed
    report = json.loads((tmp_path / "second" / "finetune.json").read_text())
    assert [stage["name"] for stage in report["before"]] == ["fine-tuned"]
    settings = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "first" / "model")
    with pytest.raises(InputError, match=r"holds an adapter and no model: name \S*second/model"):
        tune(workspace, tmp_path / "third", model=str(tmp_path / "second" / "adapter"))


def test_epochs_count_the_training_text(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"steps": 0, "method": "full", "global_batch": 7, "micro_batch": 7}
    config = configure(workspace, tmp_path, **settings, epochs=0.1)
    inputs = open_inputs(config)
    samples = sum(inputs.reader.sizes.values())
    for epochs in (0.1, 1.0, 2.5, None):
        steps = steps_of(configure(workspace, tmp_path, **settings, epochs=epochs), inputs.reader)
        wanted = (2 if epochs is None else epochs) * samples
        assert 7 * steps >= wanted - 1e-9 > 7 * (steps - 1)
    few = {"epochs": 7 * 2 / samples, "save_interval": 0}
    trainer = tune(workspace, tmp_path, **settings, **few)
    assert trainer is not None and trainer.step == trainer.config.steps in (2, 3)
    said = f"steps of 7 sequences: {trainer.step * 7 / samples:.3g} epochs of {samples:,} seq"
    assert said in capsys.readouterr().out


def test_an_epoch_draws_every_sample_once(workspace: Path, tmp_path: Path) -> None:
    config = configure(workspace, tmp_path, steps=0, epochs=1.0, method="full", seq_len=256)
    sizes = open_inputs(config).reader.sizes
    batch = sum(sizes.values())
    trainer = finetune(
        configure(
            workspace,
            tmp_path,
            steps=0,
            epochs=1.0,
            method="full",
            seq_len=256,
            global_batch=batch,
            micro_batch=batch,
        ),
        tensorboard=False,
    )
    assert trainer is not None and trainer.step == 1
    assert trainer.stream.sampler.used == sizes


def test_what_does_not_fit_the_model_is_refused_before_weights_load(
    workspace: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(workspace / "model", model)
    output = tmp_path / "out"
    for changes, message in (
        ({"last_blocks": 3, "method": "last-blocks"}, "--last-blocks 3: the model has 2 blocks"),
        ({"lora": LoraOptions(target_modules=("c_attn",))}, "--target-modules c_attn: "),
        ({"lora": LoraOptions(r=33)}, "--lora-r 33: no matrix .* the hidden size, 32; use 32"),
        ({"seq_len": 512}, "--seq-len 512 is longer than the model's 256 positions"),
        ({"distillation": DistillationConfig(weight=0.5)}, "needs a model to learn from"),
        ({"output": model}, "is the --output too"),
        ({"micro_batch": 3}, "--micro-batch 3 does not divide"),
    ):
        if "method" not in changes:
            needs("lora")
        wrong: dict[str, Any] = {"model": str(model)} | changes
        with pytest.raises(InputError, match=message):
            tune(workspace, wrong.pop("output", output), **wrong)
        assert not output.exists()


def test_a_teacher_and_a_moving_mixture(workspace: Path, tmp_path: Path) -> None:
    from data.mixture import MixtureConfig

    needs("lora")
    trainer = tune(
        workspace,
        tmp_path,
        teacher=str(workspace / "model"),
        mixture=MixtureConfig(interval=1),
        distillation=DistillationConfig(weight=0.5),
    )
    assert trainer is not None
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    divergences = [json.loads(line)["distill_kl"] for line in lines]
    # B is 0 at first, so the student begins as its teacher.
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[-1] > 1e-5
    assert (tmp_path / "reference.json").exists()


def test_adapters_are_float32_and_begin_as_the_base(workspace: Path, tmp_path: Path) -> None:
    needs("lora")
    tune(workspace, tmp_path / "a", lr=1e-30, save_dtype="float32")
    tensors = load_file(tmp_path / "a" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (4, 48)
    assert tensors[name.format("B")].shape == (32, 4)
    merged, base = load_model(tmp_path / "a" / "model"), load_model(workspace / "model")
    torch.testing.assert_close(logits(merged), logits(base), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_masters_stay_float32_where_passes_are_rounded(
    method: str, workspace: Path, tmp_path: Path
) -> None:
    needs(method)
    trainer = tune(workspace, tmp_path, method=method, precision="bf16")
    assert trainer is not None
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_muon_moves_the_blocks_that_are_trained(workspace: Path, tmp_path: Path) -> None:
    trainer = tune(workspace, tmp_path, method="last-blocks", optimizer="muon", lr=1e-2)
    assert trainer is not None
    by_muon = [g for g in trainer.optimizer.param_groups if "momentum" in g]
    assert sum(len(group["params"]) for group in by_muon) == 7
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_signals_reach_a_run(workspace: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        stop_during(3, patch)
        trainer = tune(workspace, tmp_path, method="last-blocks", save_interval=0)
    assert trainer is not None and trainer.stopping
    assert (tmp_path / "checkpoints" / "step-00000003" / "COMMITTED").exists()
    assert signal.getsignal(signal.SIGTERM) == before
