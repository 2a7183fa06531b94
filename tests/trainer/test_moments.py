"""Training that starts with moments: what it takes over, what it does not, what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.test_cpt import stop_during
from tests.trainer.tiny import losses, options, pretrain
from trainer.loop import Trainer
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config
from trainer.moments import FILE, find_moments, metadata
from trainer.optimizer import build_optimizer
from trainer.parallel import full_tensor

STEPS = 50


@pytest.fixture
def sheared(workspace: Path, tmp_path: Path) -> Path:
    """A run's folder: a model and random moments of it."""
    run = tmp_path / "run"
    shutil.copytree(workspace / "model", run / "model")
    write_moments(run)
    return run


def write_moments(run: Path, optimizer: str = "adamw") -> None:
    """Random moments as `optimizer` would leave them in `run`."""
    torch.manual_seed(4)
    train = options(optimizer=optimizer)
    # Unsharded: ranks that are forked later must make their own process group.
    model = CausalLM(load_config(run / "model"))
    tensors = {}
    for group in build_optimizer(model, train).param_groups:
        kinds = ["momentum_buffer"] if "momentum" in group else ["exp_avg", "exp_avg_sq"]
        own = set(group["params"])
        for name, parameter in model.named_parameters():
            if parameter in own:
                for kind in kinds:
                    tensors[f"{kind}/{name}"] = 1e-3 * torch.rand(parameter.shape)
    save_file(tensors, run / FILE, metadata(optimizer, STEPS, run / "model"))


def train(run: Path, workspace: Path, output: Path, **changes: Any) -> Trainer:
    own = {key: changes.pop(key) for key in ("moments", "json") if key in changes}
    trainer = pretrain(
        options(**{"steps": 1, "warmup_ratio": None, **changes}),
        model=run / "model",
        data=workspace / "tokens",
        output=output,
        reference_losses="alpha=2.0,beta=5.0",
        **own,
    )
    assert trainer is not None
    return trainer


def state_of(trainer: Trainer, kind: str) -> dict[str, Tensor]:
    found = trainer.optimizer.state
    parameters = dict(trainer.model.named_parameters())
    return {
        f"{kind}/{name}": full_tensor(found[p][kind])
        for name, p in parameters.items()
        if kind in found[p]
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_goes_on_with_them(
    optimizer: str, sheared: Path, workspace: Path, tmp_path: Path
) -> None:
    """After a step m1 = b1 m0 + (1 - b1) g, and without them (1 - b1) g, of one gradient."""
    write_moments(sheared, optimizer)
    stored = load_file(sheared / FILE)
    with_them = train(sheared, workspace, tmp_path / "a", optimizer=optimizer)
    without = train(sheared, workspace, tmp_path / "b", optimizer=optimizer, moments=False)
    decays = {"exp_avg": 0.9, "exp_avg_sq": 0.95}
    if optimizer == "muon":
        decays["momentum_buffer"] = 0.95
    for kind, decay in decays.items():
        found, empty = state_of(with_them, kind), state_of(without, kind)
        assert found and found.keys() == empty.keys()
        for name in found:
            torch.testing.assert_close(found[name] - empty[name], decay * stored[name])
    counts = {float(s["step"]) for s in with_them.optimizer.state.values() if "step" in s}
    assert counts == {STEPS + 1}


def test_there_is_no_second_warm_up(sheared: Path, workspace: Path, tmp_path: Path) -> None:
    rates = {}
    for name, given in (
        ("taken", {}),
        ("empty", {"moments": False}),
        ("own", {"warmup_ratio": 0.5}),
    ):
        output = tmp_path / name
        train(sheared, workspace, output, steps=4, **given)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        rates[name] = json.loads(lines[0])["lr"]
        assert json.loads((output / "run.json").read_text())["warmup_ratio"] is not None
    assert rates["taken"] == 1e-2 and rates["empty"] == 1e-2 and rates["own"] == 5e-3


def test_ranks_load_their_own_rows(sheared: Path, workspace: Path, tmp_path: Path) -> None:
    def run(output: Path) -> None:
        train(sheared, workspace, output, steps=6)

    for world in (1, 2):
        run_ranks(run, world, tmp_path / str(world))
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_resumed_run_needs_the_file_no_longer(
    sheared: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"steps": 6, "save_interval": 2}
    train(sheared, workspace, whole, **options)
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        assert train(sheared, workspace, parts, **options).stopping
    (sheared / FILE).unlink()
    train(sheared, workspace, parts, **options)
    name = "model/model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_goes_on_as_it_started(sheared: Path, workspace: Path, tmp_path: Path) -> None:
    """Also one from before there were moments beside its model."""
    train(sheared, workspace, tmp_path / "with")
    with pytest.raises(InputError, match="it started with the moments of shearing"):
        train(sheared, workspace, tmp_path / "with", moments=False)
    config = {"steps": 6, "save_interval": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(sheared, workspace, whole, moments=False, **config)
    with pytest.MonkeyPatch.context() as patch:
        stop_during(3, patch)
        assert train(sheared, workspace, parts, moments=False, **config).stopping
    train(sheared, workspace, parts, **config)
    name = "model/model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / FILE).unlink(), None),
        (lambda run: write_moments(run, "muon"), "is muon's, and --optimizer is adamw"),
        (lambda run: scale(run / "model" / "model.safetensors"), "is of other weights than"),
    ],
)
def test_what_does_not_belong_is_not_taken(
    change: Any, said: str | None, sheared: Path, workspace: Path, tmp_path: Path
) -> None:
    change(sheared)
    moments, note = find_moments(sheared, sheared / "model", "adamw")
    assert moments is None and (note is None if said is None else said in str(note))
    trainer = train(sheared, workspace, tmp_path / "out")
    assert {float(state["step"]) for state in trainer.optimizer.state.values()} == {1}


def scale(weights: Path) -> None:
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing", "shape"])
def test_damage_is_refused(damage: str, sheared: Path, workspace: Path, tmp_path: Path) -> None:
    path, tensors = sheared / FILE, load_file(sheared / FILE)
    about = metadata("adamw", STEPS, sheared / "model")
    first = next(iter(tensors))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        save_file(tensors, path)
    elif damage == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, path, about)
    else:
        save_file(tensors | {first: torch.zeros(3)}, path, about)
    with pytest.raises(InputError, match=FILE):
        train(sheared, workspace, tmp_path / "out")
