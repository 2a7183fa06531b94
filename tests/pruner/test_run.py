"""Whole shearing runs: what they write, how they resume and what they refuse."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import InputError
from data.mixture import MixtureConfig
from pruner import run as run_module
from pruner.callback import ShearCallback
from pruner.config import MaskConfig, RefitConfig, ShearConfig
from pruner.report import require_same_constants
from pruner.run import shear
from pruner.shapes import config_of
from pruner.timing import Timing
from tests.distributed import run_ranks
from tests.trainer.tiny import pretrain
from trainer.config import DistillationConfig, TrainConfig
from trainer.loop import Trainer
from trainer.models.hf import load_config, load_model

PUBLISHED = ("model/model.safetensors", "masks.safetensors", "source.safetensors")
TARGET = "layers=2,hidden=24,heads=2,kv-heads=1,ffn=20"


def configure(inputs: Path, output: Path, **options: Any) -> ShearConfig:
    refit = {name: options.pop(name) for name in list(options) if name.startswith("refit")}
    train: dict[str, Any] = {"steps": 8, "seq_len": 32, "global_batch": 4, "micro_batch": 2}
    train |= {
        "min_lr_ratio": None,
        "lr": 1e-3,
        "eval_sequences": 2,
        "precision": "fp32",
        "threads": 1,
    }
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
            "refit": RefitConfig(**refit),
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
    assert report["target_shape"] == {
        "layers": 2,
        "hidden": 24,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "ffn": 20,
    }
    expected = {"hidden": [24], "layer": [2], "kv_group": [1] * 3, "intermediate": [20] * 3}
    assert report["kept"] == report["alive"] == report["target"] == expected
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
    assert shear(configure(inputs, output, json=str(tmp_path / "again.json"))) is None
    assert "this run is finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "again.json").read_text()) == report
    assert {path.name for path in output.iterdir() if "partial" in path.name} == set()
    modes = {name: (output / name).stat().st_mode for name in PUBLISHED}
    assert set(modes.values()) == {(output / "shear.json").stat().st_mode}


def reject_nan(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("basis", ["principal", "source"])
@pytest.mark.parametrize("init", ["importance", "taylor", "magnitude"])
def test_no_steps_prune_at_once_by_the_initial_scores(
    init: str, basis: str, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    trainer = shear(configure(inputs, output, steps=0, init=init, basis=basis, refit=False))
    assert trainer is not None and not trainer.optimizer.state
    text = (output / "shear.json").read_text()
    report = json.loads(text, parse_constant=reject_nan)
    assert report["steps"] == report["tokens"] == 0
    assert report["final_loss"] is None
    assert report["polarised"] is True
    assert report["kept"]["intermediate"] == report["alive"]["intermediate"] == [20] * 3
    assert report["reload_difference"] <= 1e-5
    assert set(report["held_out"]) == {"alpha", "beta"}
    assert losses(output) == []
    importance = load_file(output / "source.safetensors")
    kept = load_file(output / "masks.safetensors")
    for name, count in {"hidden": 24, "layer": 2, "intermediate": 20}.items():
        best = importance[name].sort(descending=True, stable=True).indices[:, :count]
        assert torch.equal(kept[f"kept.{name}"], best.sort().values), name
    before = load_file(output / "model" / "model.safetensors")
    source = load_file(inputs / "model" / "model.safetensors")
    dims = kept["kept.hidden"][0]
    embedding = source["model.embed_tokens.weight"]
    assert report["basis"] == basis and ("basis" in kept) == (basis == "principal")
    if basis == "principal":
        embedding = (embedding.double() @ importance["basis"]).float()
        torch.testing.assert_close(kept["basis"], importance["basis"].float())
    assert torch.equal(before["model.embed_tokens.weight"], embedding[:, dims])


@pytest.mark.parametrize("rule", ["projection", "sheared-llama"])
def test_the_saved_model_is_the_one_that_was_trained(
    rule: str, inputs: Path, tmp_path: Path
) -> None:
    """Under the masks of the last step, in the norms too."""
    trainer = shear(configure(inputs, tmp_path, rule=rule))
    assert trainer is not None and trainer.masks is not None
    assert trainer.masks.hold_scale == (rule == "projection")
    ids = torch.arange(20, 50).unsqueeze(0)
    with torch.no_grad():
        trained = trainer.model(ids, masks=trainer.masks)
        saved = load_model(tmp_path / "model")(ids)
    assert (trained - saved).norm() < 1e-5 * saved.norm()


def test_a_run_cut_off_after_measuring_starts_from_what_was_measured(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shear(configure(inputs, tmp_path / "straight"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_assemble", None)
        with pytest.raises(TypeError):
            shear(configure(inputs, tmp_path / "cut"))
    assert not (tmp_path / "cut" / "checkpoints").exists()
    monkeypatch.setattr(run_module, "measure_source", None)
    shear(configure(inputs, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_continued_training_goes_on_after_the_samples_of_shearing(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shear(configure(inputs, tmp_path / "shear"))
    report = json.loads((tmp_path / "shear" / "shear.json").read_text())
    drawn = report["samples"]["used"]
    train = configure(inputs, tmp_path).train
    assert sum(drawn.values()) == train.steps * train.global_batch

    def train_on(output: str, **changes: Any) -> dict[str, int]:
        trainer = pretrain(
            replace(train, **changes),
            model=tmp_path / "shear",
            data=inputs / "tokens",
            output=tmp_path / output,
        )
        assert trainer is not None
        return trainer.stream.sampler.used

    used = train_on("same")
    assert "goes on after the" in capsys.readouterr().out
    assert sum(used.values()) == 2 * sum(drawn.values())
    assert all(used[domain] >= drawn[domain] for domain in drawn)
    # Another seed gives another order, in which nothing is known to have been drawn.
    assert sum(train_on("other", seed=train.seed + 1).values()) == sum(drawn.values())


def test_whole_blocks_are_removed_at_once(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, steps=0, target="layers=1", refit=False))
    (kept,) = load_file(output / "masks.safetensors")["kept.layer"][0].tolist()
    source = load_file(inputs / "model" / "model.safetensors")
    for name, tensor in load_file(output / "model" / "model.safetensors").items():
        original = name.replace("layers.0.", f"layers.{kept}.")
        assert torch.equal(tensor, source[original]), name
    before = (output / "shear.json").read_bytes()
    assert shear(configure(inputs, output, steps=0, target="layers=1", refit=False)) is None
    assert (output / "shear.json").read_bytes() == before


@pytest.mark.parametrize("weight", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_without_measuring_again(
    weight: float, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distillation = DistillationConfig(weight=weight)
    shear(configure(inputs, tmp_path / "straight", distillation=distillation))
    original = ShearCallback.on_step_end

    def stop_after_four(self: ShearCallback, trainer: Trainer) -> None:
        original(self, trainer)
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(ShearCallback, "on_step_end", stop_after_four)
        stopped = shear(configure(inputs, tmp_path / "resumed", distillation=distillation))
    assert stopped is not None and stopped.step == 4
    assert not (tmp_path / "resumed" / "model").exists()

    monkeypatch.delattr(run_module, "pretrained")
    monkeypatch.setattr(run_module, "measure_source", None)
    shear(configure(inputs, tmp_path / "resumed", distillation=distillation))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    for name in ("masks.safetensors", "model/model.safetensors"):
        expected = load_file(tmp_path / "straight" / name)
        found = load_file(tmp_path / "resumed" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_lost_measurements_are_refused_once_training_has_begun(
    inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, keep_last_checkpoint=True))
    (output / "shear.json").unlink()
    (output / "source.safetensors").unlink()
    with pytest.raises(InputError, match=r"source\.safetensors .* is missing or damaged"):
        shear(configure(inputs, output))


def test_a_run_cut_off_before_its_report_only_finishes(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, keep_last_checkpoint=True))
    before = json.loads((output / "shear.json").read_text())
    (output / "shear.json").unlink()
    shear(configure(inputs, output))
    after = json.loads((output / "shear.json").read_text())
    for name in ("final_loss", "held_out", "kept", "weights", "reference"):
        assert after[name] == before[name], name
    assert len(losses(output)) == 8


def test_options_that_may_change_keep_the_first_measurements(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, keep_last_checkpoint=True))
    before = json.loads((output / "shear.json").read_text())
    (output / "shear.json").unlink()
    changes = {"eval_sequences": 3, "reference_sequences": 5, "precision": "auto"}
    shear(configure(inputs, output, **changes))
    printed = capsys.readouterr().out
    assert "note: --reference-sequences 5: the source was measured with 32 when" in printed
    assert "note: --eval-sequences 3: the source was measured with 2 when" in printed
    after = json.loads((output / "shear.json").read_text())
    for name in ("reference", "source_held_out"):
        assert after[name] == before[name], name


def test_a_model_that_fails_the_check_is_not_published(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruner.report.reload_difference", lambda *_: 1e-3)
    with pytest.raises(RuntimeError, match=r"1\.00e-03.*limit 2e-04.*model\.unchecked"):
        shear(configure(inputs, tmp_path / "out"))
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "shear.json").exists()


@pytest.mark.parametrize(
    "change",
    [{"norm_eps": 1e-3}, {"rope_theta": 1e6}, {"rope_scaling": {"factor": 2.0}}, {"head_dim": 4}],
)
def test_a_changed_constant_is_noticed(inputs: Path, change: dict[str, Any]) -> None:
    source = load_config(inputs / "model")
    require_same_constants(source, source)
    with pytest.raises(RuntimeError, match=f"saved config has {next(iter(change))}="):
        require_same_constants(replace(source, **change), source)


def test_kernels_that_cannot_run_here_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--kernels triton needs a GPU, and this run is on cpu"):
        shear(configure(inputs, tmp_path / "out", kernels="triton"))
    assert not (tmp_path / "out").exists()


def test_another_target_does_not_resume(inputs: Path, tmp_path: Path) -> None:
    shear(configure(inputs, tmp_path / "out"))
    with pytest.raises(InputError, match=r"another configuration: --target was .*ffn=20.*ffn=24"):
        shear(configure(inputs, tmp_path / "out", target=TARGET.replace("ffn=20", "ffn=24")))


def test_the_lagrangian_says_that_it_did_not_polarise(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = MixtureConfig(kind="fixed")
    shear(configure(inputs, tmp_path / "out", rule="sheared-llama", mixture=mixture))
    report = json.loads((tmp_path / "out" / "shear.json").read_text())
    assert report["polarised"] is False
    assert report["kept"]["intermediate"] == [20] * 3
    assert sum(report["kept_not_alive"].values()) > 0
    assert report["reload_difference"] <= 1e-5
    assert "warning: the masks did not polarise" in capsys.readouterr().err


def test_bf16_compute_and_16_bit_weights(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shear(configure(inputs, output, precision="bf16", save_dtype="bfloat16", target="ffn=20"))
    report = json.loads((output / "shear.json").read_text())
    assert report["reload_difference"] < 0.05
    weights = load_file(output / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def shear_on_a_rank(inputs: Path, output: Path, weight: float) -> None:
    shear(configure(inputs, output, distillation=DistillationConfig(weight=weight)))


@pytest.mark.parametrize("weight", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_two_ranks_learn_the_same_masks(weight: float, inputs: Path, tmp_path: Path) -> None:
    run_ranks(shear_on_a_rank, 1, inputs, tmp_path / "one", weight)
    run_ranks(shear_on_a_rank, 2, inputs, tmp_path / "two", weight)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one = load_file(tmp_path / "one" / "masks.safetensors")
    two = load_file(tmp_path / "two" / "masks.safetensors")
    assert all(torch.equal(two[name], one[name]) for name in one)


def open_slowly_on_rank_zero(inputs: Path, output: Path, source: str) -> str:
    """Whether rank 0 was ready when this rank opened its inputs, or the error on this rank."""
    ready = output.with_name("ready")
    found = []
    original = run_module.open_inputs

    def slow(config: ShearConfig, selection: Any) -> run_module.Inputs:
        found.append(ready.exists())
        time.sleep(0.5 if os.environ["RANK"] == "0" else 0.0)
        ready.touch()
        return original(config, selection)

    with pytest.MonkeyPatch.context() as patch, pytest.raises((InputError, NameError)) as caught:
        patch.setattr(run_module, "open_inputs", slow)
        patch.delattr(run_module, "build_model")
        shear(configure(inputs, output, source=source))
    assert found == [os.environ["RANK"] != "0"]
    return str(caught.value)


def test_rank_zero_opens_the_inputs_first_and_its_error_hangs_nobody(
    inputs: Path, tmp_path: Path
) -> None:
    arguments = (inputs, tmp_path / "out")
    for message in run_ranks(open_slowly_on_rank_zero, 2, *arguments, str(inputs / "model")):
        assert "build_model" in message
    (tmp_path / "ready").unlink()
    for message in run_ranks(open_slowly_on_rank_zero, 2, *arguments, "/nowhere/model"):
        assert "no such model" in message


def test_no_weights_are_fetched_for_a_call_that_cannot_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(source: str, *, weights: bool = True, option: str) -> Path:
        assert not weights, "weights were asked for"
        return inputs / "model"

    monkeypatch.setattr("pruner.inputs.resolve_model", resolve)
    for options in ({"target": "hidden=23,heads=2"}, {"data": "/nowhere"}, {"seq_len": 512}):
        with pytest.raises(InputError):
            shear(configure(inputs, tmp_path / "out", source="some/model", **options))
    with pytest.raises(AssertionError, match="weights were asked for"):
        shear(configure(inputs, tmp_path / "out", source="some/model"))


def test_a_fit_is_evaluated_at_the_target(inputs: Path, tmp_path: Path) -> None:
    losses = {n: dict.fromkeys(("alpha", "beta"), 50 * n**-0.2 + 1) for n in (10**4, 10**5, 10**6)}
    fit = tmp_path / "fit.json"
    fit.write_text(json.dumps({"sizes": losses}))
    opened = run_module.open_inputs(configure(inputs, tmp_path / "out", reference_fit=str(fit)))
    parameters = config_of(opened.target, opened.model).num_parameters()
    assert parameters < opened.model.num_parameters()
    loss = 50 * parameters**-0.2 + 1
    expected = {"alpha": loss, "beta": loss}
    assert opened.domains.reference == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "hidden=23,heads=2"}, r"23 is not a multiple of the 2 heads.*size of 22"),
        ({"target": "heads=3"}, r"heads=3 is not a multiple of its 2 KV heads.*use heads=2"),
        ({"target": "1.3b"}, r"preset 1\.3b is made for LLaMA-2-7B"),
        ({"target": "depth=1"}, r"'depth=1' is neither a preset"),
        ({"target": "params=abc"}, r"params='abc' is not a number of parameters"),
        ({"target": "params=1b"}, r"params=1,000,000,000 is not below the source's 31,552"),
        ({"target": "params=10"}, r"params=10 is less than the smallest shape.*layers=1,hidden=8"),
        ({"json": "/", "source": "/nowhere/model"}, r"--json / is a folder; name a file in it"),
        ({"source": "/nowhere/model"}, r"--source /nowhere/model: no such model"),
        ({"data": "/nowhere/tokens"}, r"(?s)no tokenized data there.*python -m data\.tokenize"),
        ({"micro_batch": 3}, r"--micro-batch 3 does not divide"),
        ({"seq_len": 512}, r"--seq-len 512 is longer than the model's 256"),
        ({"reference_fit": "/nowhere/fit.json"}, r"/nowhere/fit\.json: no such file or folder; --"),
        ({"domain_weights": "gamma=1"}, r"--domain-weights names \['gamma'\]"),
        (
            {"distillation": DistillationConfig(weight=0.5, top_k=260)},
            r"--distill-top-k 260 is more than the vocabulary of 259",
        ),
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


def test_a_budget_is_resolved_before_training_and_kept_for_resumes(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = load_config(inputs / "model")
    limit = source.num_parameters() // 2
    output = tmp_path / "out"
    options: dict[str, Any] = {"target": f"params={limit}", "steps": 2}
    options["keep_last_checkpoint"] = True
    shear(configure(inputs, output, **options))
    record = json.loads((output / "target.json").read_text())
    printed = capsys.readouterr().out
    assert printed.index("why: ") < printed.index("measuring the source")
    assert f"target {record['shape']}" in printed
    found = load_config(output / "model").num_parameters()
    assert found == record["parameters"]["target"] <= limit
    assert found == json.loads((output / "shear.json").read_text())["parameters"]["target"]
    assert json.loads((output / "run.json").read_text())["target"] == record["shape"]

    # A finished, or a cut off, run takes the recorded shape: nothing is resolved again.
    monkeypatch.setattr("pruner.proposal.resolve", None)
    assert shear(configure(inputs, output, **options)) is None
    assert f"target params={limit} is {record['shape']}" in capsys.readouterr().out
    (output / "shear.json").unlink()
    shear(configure(inputs, output, **options))
    assert shear(configure(inputs, output, **options | {"target": record["shape"]})) is None


def test_another_budget_does_not_resume(inputs: Path, tmp_path: Path) -> None:
    shear(configure(inputs, tmp_path / "out", target="params=20k", steps=1))
    with pytest.raises(InputError, match=r"another configuration: --target was .*, now "):
        shear(configure(inputs, tmp_path / "out", target="params=12k", steps=1))


def test_a_speedup_is_measured_once_data_is_known_to_fit(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pruner.proposal.decode_timer", None)
        with pytest.raises(InputError, match="no tokenized data there"):
            shear(configure(inputs, tmp_path / "out", target="speedup=1.2", data="/nowhere"))
    sizes = {"steps": 1, "target": "speedup=1.5"}

    def timer(configs: Any) -> list[Timing]:
        return [Timing((float(1 + config.num_layers),)) for config in configs]

    monkeypatch.setattr("pruner.proposal.decode_timer", lambda *_: timer)
    shear(configure(inputs, tmp_path / "out", **sizes))
    record = json.loads((tmp_path / "out" / "target.json").read_text())
    assert record["shape"].startswith("layers=1,") or record["shape"].startswith("layers=2,")
    assert record["latency"]["measured"]["source"] == 4.0
