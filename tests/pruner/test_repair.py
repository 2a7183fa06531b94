"""The stage behind the cut: kept if better on held-out text, resumable, the same on any ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.batches import BatchStream
from data.errors import InputError
from pruner.config import RefitConfig, ShearConfig
from pruner.kept_blocks import KeptBlocks
from pruner.repair import sequences
from pruner.run import shear
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokens
from tests.pruner.test_run import configure, losses
from tests.trainer.tiny import options, pretrain
from trainer import output as output_module
from trainer.loop import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model that has learned something of its token folder."""
    root = tmp_path_factory.mktemp("trained")
    model = write_model(root / "random", num_hidden_layers=3)
    data = write_tokens(root / "tokens", model, number=80)
    train = options(steps=80, seq_len=32, lr=1e-2)
    # In a process of its own: a group left here would be in the way of ranks.
    run_ranks(lambda: pretrain(train, model=model, data=data, output=root / "run") and None, 1)
    (root / "run" / "model").rename(root / "model")
    return root


def at_once(inputs: Path, output: Path, **changes: Any) -> ShearConfig:
    usual = {"steps": 0, "refit_sequences": 64, "refit_held_out": 16}
    return configure(inputs, output, **usual | changes)


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "shear.json").read_text())
    return found


def weights_of(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model" / "model.safetensors")


def test_a_model_cut_at_once_is_refitted(trained: Path, tmp_path: Path) -> None:
    plain, refitted = tmp_path / "plain", tmp_path / "refitted"
    shear(at_once(trained, plain, refit=False))
    shear(at_once(trained, refitted))
    assert report_of(plain)["refit"] is None
    told = report_of(refitted)["refit"]
    assert told["kept"] and told["after"] < told["before"]
    assert (told["sequences"], told["held_out_sequences"], told["ridge"]) == (64, 16, 0.1)
    assert told["tokens"] == 64 * 32
    before, after = weights_of(plain), weights_of(refitted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if ".layers." in name and "norm" not in name}
    assert changed == matrices
    reports = [report_of(output)["held_out"] for output in (refitted, plain)]
    assert all(reports[0][domain]["loss"] < reports[1][domain]["loss"] for domain in reports[0])
    assert {path.name for path in refitted.iterdir()} == {path.name for path in plain.iterdir()}


def test_a_refit_that_is_not_better_changes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sequence and hardly a penalty: the weights fit that sequence, and no other text."""
    shear(at_once(trained, tmp_path / "plain", refit=False))
    shear(at_once(trained, tmp_path / "out", refit_sequences=1, refit_ridge=1e-9))
    told = report_of(tmp_path / "out")["refit"]
    assert not told["kept"] and told["after"] >= told["before"]
    assert "not better: the weights stay as they were cut" in capsys.readouterr().out
    before, after = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "out" / "model.refitted").exists()


def test_an_interrupted_refit_goes_on_from_its_blocks(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shear(at_once(trained, tmp_path / "straight"))
    original = KeptBlocks.keep

    def stop(self: KeptBlocks, number: int, tensors: dict[str, Tensor]) -> None:
        original(self, number, tensors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KeptBlocks, "keep", stop)
        shear(at_once(trained, tmp_path / "out"))
    (kept,) = (tmp_path / "out" / "refit").glob("*/*")
    assert kept.name == "block-00000.safetensors"
    written: list[int] = []

    def note(self: KeptBlocks, number: int, tensors: dict[str, Tensor]) -> None:
        written.append(number)

    monkeypatch.setattr(KeptBlocks, "keep", note)
    shear(at_once(trained, tmp_path / "out"))
    assert written == [1]
    straight, resumed = weights_of(tmp_path / "straight"), weights_of(tmp_path / "out")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not (tmp_path / "out" / "refit").exists()


def test_damaged_blocks_are_refitted_again(tmp_path: Path, trained: Path) -> None:
    class Alone:
        is_main = True

        def broadcast(self, value: int) -> int:
            return value

    context: Any = Alone()
    for number in (0, 1, 3):
        source = trained / "model" / "model.safetensors"
        whole = source.read_bytes()
        (tmp_path / f"block-{number:05d}.safetensors").write_bytes(whole)
    assert KeptBlocks(tmp_path, context).count == 2
    (tmp_path / "block-00001.safetensors").write_bytes(whole[:-9])
    assert KeptBlocks(tmp_path, context).count == 1
    assert KeptBlocks(None, context).count == 0


def test_what_is_fitted_is_what_training_draws_next(trained: Path, tmp_path: Path) -> None:
    trainer = shear(at_once(trained, tmp_path / "out", refit=False))
    assert trainer is not None
    config = RefitConfig(refit_sequences=8, refit_held_out=4)
    ids, held_out = sequences(trainer, config)
    assert (len(ids), len(held_out)) == (8, 4)
    again, _ = sequences(trainer, config)
    assert torch.equal(ids, again)
    stream = BatchStream(trainer.stream.reader, trainer.stream.sampler, 4)
    trained_on = [stream.next().ids for _ in range(3)]
    rows = {tuple(row) for batch in trained_on for row in batch.tolist()}
    assert {tuple(row) for row in torch.cat([ids, held_out]).tolist()} == rows


def test_few_sequences_come_once_and_a_quarter_is_held_out(trained: Path, tmp_path: Path) -> None:
    trainer = shear(at_once(trained, tmp_path / "out", refit=False))
    assert trainer is not None
    sampler = trainer.stream.sampler
    ids, held_out = sequences(trainer, RefitConfig(refit_sequences=10 * sum(sampler.sizes)))
    rows = {tuple(row) for row in torch.cat([ids, held_out]).tolist()}
    assert len(rows) == len(ids) + len(held_out) <= sum(sampler.sizes)
    assert len(held_out) == min(32, (len(ids) + len(held_out)) // 4)


def test_masks_learned_on_frozen_weights(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    trainer = shear(at_once(trained, output, steps=4, freeze_weights=True, basis="source"))
    assert isinstance(trainer, Trainer) and not trainer.optimizer.state
    source = load_file(trained / "model" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, source[name].float()), name
        assert parameter.grad is None and not parameter.requires_grad
    report = report_of(output)
    assert report["polarised"] and report["refit"]["kept"]
    wanted = {"from": None, "init": "importance", "mask_steps": 4, "weights": "frozen"}
    found = report["selection"]
    counts = found.pop("in_doubt")
    assert found == wanted
    assert counts.keys() == report["families"].keys() and sum(counts.values()) > 0
    lines = (output / "metrics.jsonl").read_text().splitlines()
    # The count is met at the last step, whose masks still learn.
    assert json.loads(lines[-1])["target_hidden"] == 24
    assert json.loads(lines[-1])["grad_norm"] == 0
    shear(at_once(trained, tmp_path / "none", steps=0, basis="source"))
    plain = load_file(tmp_path / "none" / "masks.safetensors")
    learned = load_file(output / "masks.safetensors")
    assert any(not torch.equal(plain[name], learned[name]) for name in plain)


def test_frozen_weights_leave_the_masks_gradients_as_they_are(
    trained: Path, tmp_path: Path
) -> None:
    """A learning rate of next to nothing moves no weight either, and the masks go the same way."""
    shear(at_once(trained, tmp_path / "frozen", steps=4, freeze_weights=True, target_warmup=0.5))
    free = {"steps": 5, "harden": 1.0, "target_warmup": 0.4, "lr": 1e-12}
    shear(at_once(trained, tmp_path / "free", **free))
    frozen, trained_too = losses(tmp_path / "frozen"), losses(tmp_path / "free")
    assert frozen == pytest.approx(trained_too[:4], abs=1e-6)


def test_a_frozen_run_resumes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = {"steps": 4, "freeze_weights": True, "save_interval": 2}
    shear(at_once(trained, tmp_path / "straight", **frozen))
    original = Trainer.train_step

    def stop(self: Trainer) -> None:
        original(self)
        self.stopping = self.step == 2

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        shear(at_once(trained, tmp_path / "out", **frozen))
    assert not (tmp_path / "out" / "model").exists()
    shear(at_once(trained, tmp_path / "out", **frozen))
    straight, resumed = weights_of(tmp_path / "straight"), weights_of(tmp_path / "out")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_trained_weights_are_not_refitted(trained: Path, tmp_path: Path) -> None:
    shear(at_once(trained, tmp_path / "out", steps=2))
    assert report_of(tmp_path / "out")["refit"] is None


def test_a_refit_writes_the_model_twice_and_frozen_weights_have_no_moments(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[dict[str, int]] = []

    def note(_: Path, **sizes: int) -> str:
        needs.append(sizes)
        return "full"

    monkeypatch.setattr(output_module, "room_problem", note)
    trains = {"freeze_weights": False}
    for changes in ({}, {"refit": False}, trains, trains | {"save_moments": False}):
        options: dict[str, Any] = {"steps": 2, "freeze_weights": True} | changes
        with pytest.raises(InputError, match="full"):
            shear(at_once(trained, tmp_path / "out", **options))
    assert needs[0]["model"] == 3 * needs[1]["model"] == 3 * needs[3]["model"]
    # Two moments in fp32 beside the fp32 model.
    assert needs[2]["model"] == 3 * needs[3]["model"]
    assert 3 * needs[0]["checkpoint"] == 3 * needs[1]["checkpoint"] == needs[2]["checkpoint"]


@pytest.mark.parametrize("steps", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_refit_as_one(steps: int, trained: Path, tmp_path: Path) -> None:
    """With masks on frozen weights before it, too."""
    run_ranks(_refit_on_ranks, 1, trained, tmp_path / "one", steps)
    run_ranks(_refit_on_ranks, 2, trained, tmp_path / "two", steps)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-4)
    one, two = report_of(tmp_path / "one")["refit"], report_of(tmp_path / "two")["refit"]
    assert two["before"] == pytest.approx(one["before"], abs=1e-4)
    assert two["after"] == pytest.approx(one["after"], abs=2e-3)
    assert two["kept"] and two["tokens"] == one["tokens"]


def _refit_on_ranks(trained: Path, output: Path, steps: int) -> None:
    shear(at_once(trained, output, steps=steps, freeze_weights=steps > 0))
