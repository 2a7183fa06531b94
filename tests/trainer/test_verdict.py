"""Verdicts compare equal text only, and say what they leave out."""

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.factories import write_model
from tests.trainer.tiny import options, pretrain
from trainer.evaluate import DomainLoss
from trainer.verdict import (
    Stage,
    Verdict,
    conclude,
    read_stage,
    show,
    show_trained,
    stages_of,
)

ON = {"data": "f", "seq_len": 32}


def stage(name: str, *losses: float, tokens: int = 62, on: Any = ON, **others: Any) -> Stage:
    domains = dict(zip(("c4", "code"), losses, strict=False))
    measured = {domain: DomainLoss(loss, tokens) for domain, loss in domains.items()}
    return Stage(name, f"runs/{name}/model", measured, on, **others)


SOURCE = stage("source", 1.0, 2.0, parameters=(1000, 800))
SHEARED = stage("sheared", 3.0, 4.0, parameters=(500, 300))
TRAINED = stage("trained", 2.0, 3.5, parameters=(500, 300))


def test_the_share_of_the_gap_that_training_took_back() -> None:
    verdict = conclude([SOURCE, SHEARED, TRAINED], {"c4": 0.5, "code": 0.5})
    assert verdict.header == ["domain", "source", "sheared", "now", "gap closed", "weight"]
    assert verdict.rows == [
        ["c4", "1.0000", "3.0000", "2.0000", "50%", "0.500"],
        ["code", "2.0000", "4.0000", "3.5000", "25%", "0.500"],
        ["mean", "1.5000", "3.5000", "2.7500", "38%", "1.000"],
    ]
    assert "1.500 → 3.500 → 2.750 nats" in verdict.lines[0] and "took back 38%" in verdict.lines[0]
    assert any("1,000 → 500, without embeddings 800 → 300 (38%)" in x for x in verdict.lines)
    assert any("decoding speed: not measured" in line for line in verdict.lines)


@pytest.mark.parametrize(
    ("before", "why"),
    [
        (stage("sheared", 3.0, 4.0, tokens=31), "measured on other sequences"),
        (stage("sheared", 3.0, 4.0, on={"data": "f", "seq_len": 64}), "on other sequences"),
        (stage("sheared", 3.0, 4.0, on={"data": "g", "seq_len": 32}), "on other sequences"),
        (stage("sheared", 3.0), "on other sequences"),
        (stage("sheared", 3.0, 4.0, on=None), "perhaps measured on other sequences"),
        (stage("sheared"), "it was not measured"),
    ],
    ids=["number", "length", "data", "domains", "unknown", "none"],
)
def test_unequal_text_is_left_out_and_said_to_be(before: Stage, why: str) -> None:
    verdict = conclude([SOURCE, before, TRAINED], {})
    assert verdict.header == ["domain", "source", "now"]
    assert any(line.startswith("sheared: left out") and why in line for line in verdict.lines)


def test_domains_without_held_out_text_stay_in_the_table() -> None:
    weights = {"c4": 0.4, "books": 0.28, "code": 0.32}
    verdict = conclude([SOURCE, SHEARED], weights)
    assert verdict.rows[2] == ["books", "no text", "no text", "0.280"]
    assert verdict.rows[3][-1] == "1.000"
    assert "no held-out text to measure: books (28% of the training data)" in verdict.lines


def test_a_gap_of_nothing_has_no_share() -> None:
    same = replace(SOURCE, name="sheared")
    assert "gap closed" not in conclude([SOURCE, same, TRAINED], {}).header
    worse = conclude([SOURCE, SHEARED, stage("trained", 5.0, 5.0)], {})
    assert worse.rows[-1][-1] == "-75%" and "made it worse" in worse.lines[0]


def test_the_next_report_leaves_out_runs_that_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    before = [replace(SHEARED, model=str(tmp_path / "gone" / "model")).to_json()]
    content = {"before": before, "held_out": {}, "held_out_on": {"data": "d", "seq_len": 8}}
    show_trained(content, model.parent, tmp_path / "start", "tokens")
    assert f"next: shorn report {model.parent}\n" in capsys.readouterr().out


def test_nothing_measured_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = conclude([SOURCE, stage("trained")], {"c4": 1.0})
    assert verdict.rows == [] and "no verdict" in verdict.lines[0]
    show(verdict, ["shorn report 'a b'"])
    shown = capsys.readouterr().out
    assert "next: shorn report 'a b'" in shown and "┃" not in shown


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: 5,
        lambda entry: entry | {"held_out": [1]},
        lambda entry: entry | {"held_out": {"c4": {"loss": "x", "tokens": 1}}},
        lambda entry: {"name": "source"},
        lambda entry: entry | {"parameters": "many"},
    ],
)
def test_a_carried_stage_of_another_form_is_none(change: Callable[[Any], Any]) -> None:
    entry = json.loads(json.dumps(SOURCE.to_json()))
    assert read_stage(entry) == SOURCE
    assert read_stage(change(entry)) is None


@pytest.mark.parametrize("content", ["", "{", "5", "[]", '{"held_out": 5, "before": 7}'])
def test_a_damaged_report_ends_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "shear.json").write_text(content)
    assert all(not stage.losses for stage in stages_of(tmp_path))


def test_training_carries_what_came_before(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from a report that a former version wrote, whose text run.json knows."""
    run = tmp_path / "shear"
    write_model(run / "model", vocab_size=259)
    train = options(steps=2)
    pretrain(train, model=run / "model", data=workspace / "tokens", output=tmp_path / "first")
    first = json.loads((tmp_path / "first" / "cpt.json").read_text())
    assert first["before"] == [] and first["held_out_on"]["seq_len"] == 16
    assert "before training was not measured" in capsys.readouterr().out
    identity = json.loads((tmp_path / "first" / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({k: identity[k] for k in ("data", "seq_len")}))
    measured = {name: row | {"loss": 9.0} for name, row in first["held_out"].items()}
    lower = {name: row | {"loss": 1.0} for name, row in first["held_out"].items()}
    old = {"source": "base", "held_out": measured, "source_held_out": lower}
    (run / "shear.json").write_text(json.dumps(old))
    pretrain(train, model=run / "model", data=workspace / "tokens", output=tmp_path / "second")
    shown = capsys.readouterr().out
    assert "gap closed" in shown and "source → sheared → now" in shown
    # The source, "base", is not there any more.
    assert f"next: shorn evaluate --model {run}/model {tmp_path}/second/model" in shown
    (tmp_path / "link").symlink_to(run / "model")
    linked = tmp_path / "linked"
    pretrain(train, model=tmp_path / "link", data=workspace / "tokens", output=linked)
    assert "source → sheared → now" in capsys.readouterr().out
    second = json.loads((tmp_path / "second" / "cpt.json").read_text())
    assert [entry["name"] for entry in second["before"]] == ["source", "sheared"]
    third = tmp_path / "third"
    model = tmp_path / "second" / "model"
    pretrain(
        options(steps=2, eval_sequences=3), model=model, data=workspace / "tokens", output=third
    )
    shown = capsys.readouterr().out
    assert shown.count("measured on other sequences") == 3
    assert [s.name for s in stages_of(third)] == ["source", "sheared", "trained", "trained"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_verdict_that_nobody_can_read_fails_no_run(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sys.stdout", Closed())
    show(Verdict(["domain"], [["mean"]], ["line"]), ["next"])


def test_what_fine_tuning_took_back_counts_from_shearing_on() -> None:
    tuned = stage("fine-tuned", 1.5, 2.5, parameters=(500, 300))
    verdict = conclude([SOURCE, SHEARED, TRAINED, tuned], {})
    assert verdict.header == ["domain", "source", "sheared", "trained", "now", "gap closed"]
    assert verdict.rows[-1] == ["mean", "1.5000", "3.5000", "2.7500", "2.0000", "75%"]
    assert "training took back 75% of what shearing lost" in verdict.lines[0]
