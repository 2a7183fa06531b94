"""A mixture that moves draws the same samples on every layout, and exactly so when replayed."""

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import InputError
from data.mixture import MixtureConfig
from data.sampler import DomainSampler
from data.weight_history import read_history
from tests.distributed import run_ranks
from tests.trainer.tiny import make_trainer, options, pretrain
from trainer import cpt
from trainer.callbacks.mixture import MixtureCallback
from trainer.loop import Trainer

STEPS = 120
MOVING = MixtureConfig(strength=4.0)


def draw(
    workspace: Path,
    output: Path,
    micro_batch: int,
    changes: dict[str, Any],
    mixture: MixtureConfig = MOVING,
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """(rows of all global batches [steps, batch, 3], weights at each update) of a tiny run."""
    plans = []
    original = DomainSampler.next_batch

    def record(self: DomainSampler, global_batch: int) -> np.ndarray:
        plans.append(original(self, global_batch))
        return plans[-1]

    config = options(**{"steps": STEPS, "micro_batch": micro_batch} | changes)
    history = read_history(Path(mixture.history)) if mixture.history else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainSampler, "next_batch", record)
        trainer = make_trainer(workspace, output, config, mixture=mixture, history=history)
        trainer.fit()
    weights = read_history(output).weights
    return np.stack(plans), [weights[step] for step in sorted(weights)]


def test_layouts_agree_about_a_mixture_that_moves(workspace: Path, tmp_path: Path) -> None:
    [(one, weights)] = run_ranks(draw, 1, workspace, tmp_path / "one", 8, {})
    assert len(weights) == 21 and weights[0]["alpha"] == 0.5
    assert max(abs(w["alpha"] - weights[0]["alpha"]) for w in weights) > 0.3
    assert len({w["alpha"] for w in weights}) > 3
    [(small, seen)] = run_ranks(draw, 1, workspace, tmp_path / "small", 2, {})
    assert seen == weights and np.array_equal(small, one)
    for plan, seen in run_ranks(draw, 2, workspace, tmp_path / "two", 4, {}):
        assert seen == weights and np.array_equal(plan, one)


def test_a_replay_draws_the_same_samples_whatever_the_losses(
    workspace: Path, tmp_path: Path
) -> None:
    """Another learning rate stands for a layout whose losses differ by any amount."""
    one, weights = draw(workspace, tmp_path / "one", 8, {})
    slow = {"lr": 1e-4}
    other, parted = draw(workspace, tmp_path / "other", 8, slow)
    assert parted != weights and not np.array_equal(other, one)
    replay = MixtureConfig(kind="replay", history=str(tmp_path / "one"))
    again, seen = draw(workspace, tmp_path / "again", 4, slow, replay)
    assert seen == weights and np.array_equal(again, one)
    # What a replay leaves behind can be replayed, and a shorter run may follow a longer one.
    replay = MixtureConfig(kind="replay", history=str(tmp_path / "again" / "mixture.jsonl"))
    first, _ = draw(workspace, tmp_path / "first", 8, slow | {"steps": 50}, replay)
    assert np.array_equal(first, one[:50])


def run(workspace: Path, output: Path, steps: int = 12, **changes: Any) -> Trainer:
    names = ("seed", "global_batch", "save_interval", "lr")
    train = {"eval_sequences": 0} | {n: changes.pop(n) for n in names if n in changes}
    mixture = MixtureConfig(**{"strength": 20.0, "interval": 3} | changes.pop("mixture", {}))
    trainer = pretrain(
        options(steps=steps, **train),
        model=workspace / "model",
        data=workspace / "tokens",
        output=output,
        mixture=mixture,
        reference_losses=changes.pop("reference_losses", "alpha=2,beta=5"),
        **changes,
    )
    assert trainer is not None
    return trainer


def replay(source: Path, **others: Any) -> dict[str, Any]:
    return {"kind": "replay", "history": str(source), "interval": None, **others}


def test_a_resumed_run_has_each_update_once(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workspace, tmp_path / "straight")
    output = tmp_path / "killed"
    original = Trainer.train_step

    def die(self: Trainer) -> None:
        original(self)
        if self.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            run(workspace, output, save_interval=4)
    with (output / "mixture.jsonl").open("a") as file:
        file.write('{"step": 9, "weights": {"alpha": 0.9, "beta": 0.1}}\n{"step": 12, "wei')
    run(workspace, output, save_interval=4)
    straight, resumed = (tmp_path / n / "mixture.jsonl" for n in ("straight", "killed"))
    assert resumed.read_bytes() == straight.read_bytes()
    assert sorted(read_history(straight).weights) == [0, 3, 6, 9, 12]


def test_metrics_hold_the_weights_of_the_history(workspace: Path, tmp_path: Path) -> None:
    trainer = run(workspace, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    history = read_history(tmp_path).weights
    for record in lines:
        known = history[record["step"] // 3 * 3]
        assert record["domain_weights"] == pytest.approx(known, abs=1e-9)
    assert trainer.stream.sampler.weights == history[12]


def test_what_a_replay_cannot_repeat_is_refused_before_loading(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(workspace, tmp_path / "one")
    source = tmp_path / "one" / "mixture.jsonl"
    monkeypatch.delattr(cpt, "build_model")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, r"another --seed: seed 0 there, 1 here"),
        ({"global_batch": 16}, r"another --global-batch"),
        ({"mixture": replay(source, interval=4)}, r"every 3 steps, and --mixture-interval is 4"),
        ({"steps": 30}, r"no weights of step 15, .*30 steps needs \(it goes to step 12\)"),
        ({"domain_weights": "alpha=1,beta=1"}, r"leave --domain-weights out"),
        ({"mixture": replay(tmp_path / "no")}, r"no: no such file.*--mixture-history takes"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            run(workspace, tmp_path / "two", **({"mixture": replay(source)} | changes))
    lines = source.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    edits: list[tuple[list[str], str]] = [
        ([lines[0], lines[1], *lines[3:]], r"no weights of step 6"),
        ([*lines[:3], lines[2]], r"mixture\.jsonl:4: `step` is 6; .*no step comes twice"),
        (lines[1:], r"mixture\.jsonl:1: `interval` is missing"),
        ([json.dumps(header | {"data": "0" * 64}) + "\n", *lines[1:]], r"other data: data 000"),
        ([lines[0], lines[1].replace("beta", "gamma")], r"jsonl:2: `weights` names .*gamma"),
        ([lines[0], '{"step": 3, "weights": {"alpha": NaN, "beta": 1}}\n'], r"jsonl:2: `weights`"),
        (["5\n"], r"jsonl:1: holds a whole number"),
        ([], r"is empty"),
        ([json.dumps(header | {"interval": 0}) + "\n"], r"`interval` is 0"),
        (
            [json.dumps(header | {"used": {"alpha": 5, "beta": 0}}) + "\n", *lines[1:]],
            r"other samples passed over",
        ),
    ]
    for content, message in edits:
        source.write_text("".join(content))
        with pytest.raises(InputError, match=message):
            run(workspace, tmp_path / "two", mixture=replay(source))
    assert not (tmp_path / "two").exists()


def test_a_replayed_run_is_known_by_what_it_repeats(workspace: Path, tmp_path: Path) -> None:
    run(workspace, tmp_path / "one")
    run(workspace, tmp_path / "other", reference_losses="alpha=5,beta=2")
    moved = tmp_path / "moved.jsonl"
    output = tmp_path / "out"
    run(workspace, output, mixture=replay(tmp_path / "one"))
    (tmp_path / "one" / "mixture.jsonl").rename(moved)
    # The same content under another name is the same run, which is finished.
    with pytest.raises(AssertionError):
        run(workspace, output, mixture=replay(moved))
    with pytest.raises(InputError, match=r"another configuration: --mixture-history was"):
        run(workspace, output, mixture=replay(tmp_path / "other"))


def test_changes_of_weights_are_shown(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workspace, tmp_path / "moving")
    shown = [t for t in capsys.readouterr().out.splitlines() if "domain weights  " in t]
    assert shown[0].startswith("step 3: domain weights  ") and " -> " in shown[0]
    assert len(shown) <= 4
    run(workspace, tmp_path / "still", reference_losses="alpha=9,beta=9")
    assert "domain weights  " not in capsys.readouterr().out
    run(workspace, tmp_path / "never", mixture={"interval": 12})
    printed = capsys.readouterr().out
    assert "note: --mixture-interval 12 is not below --steps 12" in printed


def test_a_short_run_is_not_swallowed(workspace: Path, tmp_path: Path) -> None:
    """Twelve steps with the defaults: no update moves a weight by more than 2 and a rescaling."""
    run(workspace, tmp_path, mixture={"strength": 4.0, "interval": None})
    weights = read_history(tmp_path).weights
    assert sorted(weights) == list(range(13))
    start = weights[0]
    assert weights[1] == pytest.approx(start, rel=0.5)
    assert weights[12]["alpha"] > start["alpha"]


def former(output: Path) -> None:
    """Makes a run look as it was saved before there was a grid, a history and a default interval
    that follows the length of the run."""
    path = output / "run.json"
    identity = json.loads(path.read_text())
    del identity["mixture"]["history"]
    identity["mixture"]["interval"] = 10
    path.write_text(json.dumps(identity))
    (output / "mixture.jsonl").unlink()


def test_a_run_from_before_the_grid_goes_on_as_it_began(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, state_dict = Trainer.train_step, MixtureCallback.state_dict

    def stop(self: Trainer) -> None:
        original(self)
        self.stopping = self.step == 8

    def old_state(self: MixtureCallback) -> dict[str, Any]:
        state = state_dict(self)
        return state | {"mixture": {"weights": state["mixture"]["weights"]}}

    default = {"interval": None}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        patch.setattr(MixtureCallback, "state_dict", old_state)
        run(workspace, tmp_path, 40, save_interval=8, mixture=default)
    former(tmp_path)
    with pytest.raises(InputError, match="--mixture-interval was"):
        run(workspace, tmp_path, 40, mixture={"interval": 2})
    capsys.readouterr()
    trainer = run(workspace, tmp_path, 40, mixture=default)
    (callback,) = (c for c in trainer.callbacks if isinstance(c, MixtureCallback))
    assert callback.interval == 10 and callback.mixture.weights == callback.mixture.exact
    assert "--mixture replay cannot repeat it" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    alpha = [line["domain_weights"]["alpha"] for line in lines[8:]]
    changed = [step + 9 for step in range(1, len(alpha)) if alpha[step] != alpha[step - 1]]
    assert changed == [10, 20, 30, 40]


class Full:
    """The file of a disk that is full once it has taken a few bytes."""

    def __init__(self, file: Any) -> None:
        self.file, self.room = file, 5

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part, self.room = data[: self.room], 0
        return int(self.file.write(part))

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        raise OSError(errno.EDQUOT, "as some network file systems answer")


def fill(workspace: Path, output: Path) -> str:
    """Messages of a run whose disk is full at the second update, after a checkpoint."""
    trainer = make_trainer(workspace, output, options(steps=12, save_interval=4))
    original = MixtureCallback._write

    def write(self: MixtureCallback, trainer: Trainer) -> None:
        if trainer.step == 6 and self._file is not None:
            full: Any = Full(self._file)
            self._file = full
        original(self, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureCallback, "_write", write)
        try:
            trainer.fit()
        except InputError as error:
            return str(error)
    return ""


def test_a_full_disk_ends_all_ranks_with_one_message(workspace: Path, tmp_path: Path) -> None:
    messages = run_ranks(fill, 2, workspace, tmp_path / "full")
    assert len(set(messages)) == 1
    assert re.search(r"mixture\.jsonl: no space left.*goes on from the last check", messages[0])
    # What was cut off is no part of the history of the run that goes on.
    make_trainer(workspace, tmp_path / "full", options(steps=12, save_interval=4)).fit()
    assert sorted(read_history(tmp_path / "full").weights) == [0, 3, 6, 9, 12]


def refused_at_the_start(workspace: Path, output: Path) -> str:
    try:
        make_trainer(workspace, output, options(steps=2)).fit()
    except InputError as error:
        return str(error)
    return ""


def test_a_file_that_cannot_be_opened_stops_every_rank(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "mixture.jsonl").mkdir()
    messages = run_ranks(refused_at_the_start, 2, workspace, tmp_path)
    assert messages[0] == messages[1] and "mixture.jsonl: is a folder" in messages[0]
