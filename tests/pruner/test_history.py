"""OUTPUT/history.jsonl says what the masks were, once per recorded step, also after a resume."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from pruner.callback import ShearCallback
from pruner.history import (
    BINS,
    FILE,
    RECORDS,
    SNAPSHOTS,
    HistoryCallback,
    decode_mask,
    encode_mask,
    group_means,
    histogram,
    read_records,
    record_interval,
    snapshot_interval,
)
from pruner.shapes import shape_of
from pruner.units import unit_kinds
from tests.distributed import run_ranks
from tests.pruner.test_callback import MODEL, TARGET, make_trainer
from trainer.checkpoint import Checkpointer
from trainer.loop import Callback, Trainer


class Watch(Callback):
    """Keeps what the run's masks were after every step."""

    name: ClassVar[str] = "watch"

    def __init__(self, shear: ShearCallback) -> None:
        self.shear = shear
        self.seen: dict[int, tuple[dict[str, Tensor], dict[str, list[float]]]] = {}

    def on_step_end(self, trainer: Trainer) -> None:
        z = {name: values.clone() for name, values in self.shear.z.items()}
        multipliers = self.shear.rule.count_multipliers.items()
        self.seen[trainer.step] = (z, {name: v.flatten().tolist() for name, v in multipliers})


def recorded(output: Path, **options: Any) -> tuple[Trainer, Watch]:
    """A trainer that writes its history to `output`."""
    trainer, shear = make_trainer(**options)
    watch = Watch(shear)
    trainer.callbacks += [HistoryCallback(shear, output), watch]
    return trainer, watch


def steps_of(output: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output / FILE).read_text().splitlines()]


@pytest.mark.parametrize("rule", ["projection", "sheared-llama"])
def test_records_are_the_masks_of_their_steps(rule: str, tmp_path: Path) -> None:
    trainer, watch = recorded(tmp_path, rule=rule)
    trainer.fit()
    records = read_records(tmp_path / FILE)
    assert [record["step"] for record in records] == list(range(1, 9))
    kinds = unit_kinds(TARGET, shape_of(MODEL))
    for record in records:
        z, multipliers = watch.seen[record["step"]]
        assert record["families"].keys() == z.keys() == kinds.keys()
        step = record["step"] - 1
        assert record["temperature"] == watch.shear.rule.temperature(step)
        for name, kind in kinds.items():
            found, values = record["families"][name], z[name].numpy()
            assert (found["rows"], found["units"]) == values.shape
            assert found["target"] == kind.target
            assert found["current_target"] == watch.shear.rule.current_target(kind, step)
            assert found["alive"] == [int((row >= np.float32(0.99)).sum()) for row in values]
            assert found["nonzero"] == [int(np.count_nonzero(row)) for row in values]
            assert found["multipliers"] == pytest.approx(multipliers[name], rel=1e-5)
            assert found["histogram"] == np.histogram(values, BINS, (0, 1))[0].tolist()
            restored = decode_mask(record["masks"][name])
            assert restored.shape == values.shape
            assert np.abs(restored - values).max() <= 0.5 / 255 + 1e-9


def test_a_resumed_run_has_the_record_of_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, _ = recorded(tmp_path / "straight")
    straight.fit()
    output = tmp_path / "resumed"
    stopped, _ = recorded(output)
    stopped._call("on_train_start")
    for _ in range(4):
        stopped.train_step()
    path = Checkpointer(output / "checkpoints", stopped.context).save(stopped)
    stopped.train_step()
    stopped._call("on_exit")
    assert steps_of(output) == [1, 2, 3, 4, 5]
    with (output / FILE).open("a") as file:
        file.write('{"step": 6, "fam')
    resumed, _ = recorded(output)
    Checkpointer(output / "checkpoints", resumed.context).restore(resumed, path)
    resumed.fit()
    assert (output / FILE).read_bytes() == (tmp_path / "straight" / FILE).read_bytes()


def test_a_run_that_began_without_history_can_be_resumed(tmp_path: Path) -> None:
    old, _ = make_trainer()
    for _ in range(5):
        old.train_step()
    path = Checkpointer(tmp_path / "checkpoints", old.context).save(old)
    trainer, _ = make_trainer()
    trainer.callbacks.append(HistoryCallback(trainer.callbacks[0], tmp_path))  # type: ignore[arg-type]
    Checkpointer(tmp_path / "checkpoints", trainer.context).restore(trainer, path)
    trainer.fit()
    assert steps_of(tmp_path) == [6, 7, 8]


def test_one_of_several_ranks_writes(tmp_path: Path) -> None:
    def train(output: Path) -> bool:
        trainer, watch = recorded(output)
        wrote = []
        watch.on_step_end = lambda trainer: wrote.append(trainer.callbacks[1].log.is_open)  # type: ignore[attr-defined, method-assign]
        trainer.fit()
        return any(wrote)

    assert run_ranks(train, 2, tmp_path) == [True, False]
    assert steps_of(tmp_path) == list(range(1, 9))


@pytest.mark.parametrize("steps", [1, 7, 40, 41, 199, 200, 399, 400, 3200, 24000])
def test_records_are_few_and_hold_some_masks(steps: int) -> None:
    every, masks = record_interval(steps), snapshot_interval(steps)
    assert every == max(1, steps // 200)
    assert masks % every == 0
    assert min(steps, RECORDS) <= steps // every < 2 * RECORDS
    assert steps // masks <= SNAPSHOTS
    assert steps < 3 * SNAPSHOTS or steps // masks > SNAPSHOTS // 3


def test_only_due_steps_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pruner.history.RECORDS", 3)
    monkeypatch.setattr("pruner.history.SNAPSHOTS", 2)
    trainer, _ = recorded(tmp_path)
    trainer.fit()
    records = read_records(tmp_path / FILE)
    assert [record["step"] for record in records] == [1, 2, 4, 6, 8]
    assert [record["step"] for record in records if "masks" in record] == [1, 4, 8]


def test_large_families_are_averaged() -> None:
    z = torch.rand(32, 1000, generator=torch.Generator().manual_seed(0))
    entry = encode_mask(z)
    assert entry["columns"] == 128
    groups = np.array_split(z.numpy(), [1000 * i // 128 for i in range(1, 128)], axis=1)
    means = np.stack([group.mean(1) for group in groups], axis=1)
    assert np.abs(decode_mask(entry) - means).max() <= 0.5 / 255 + 1e-6
    assert encode_mask(z[:16])["columns"] == 1000
    assert encode_mask(torch.ones(1000, 100))["columns"] == 100
    assert group_means(np.arange(6.0)[None], 3).tolist() == [[0.5, 2.5, 4.5]]


def test_histogram_counts_every_unit_once() -> None:
    z = torch.tensor([[0.0, 1e-6, 0.05, 0.5, 0.99, 1.0]])
    counts = histogram(z)
    assert sum(counts) == 6
    assert (counts[0], counts[1], counts[10], counts[19]) == (2, 1, 1, 2)


def test_other_content_is_refused() -> None:
    entry = encode_mask(torch.rand(2, 5))
    with pytest.raises(ValueError):
        decode_mask(entry | {"data": "?" + entry["data"]})
    with pytest.raises(ValueError):
        decode_mask(entry | {"columns": 3})


def test_a_file_that_is_being_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert read_records(path) == []
    path.write_text('{"step": 1}\n[2]\n"step"\n{"step": 3}\n{"ste')
    assert read_records(path) == [{"step": 1}, {"step": 3}]
