"""The demo's report: claims follow the numbers, a wrong reload is caught, pictures are written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.demo import plots
from launch.demo import report as demo_report
from launch.demo.report import Results, loss_checks, reload_check
from tests.factories import write_model

NAMES = ("source", "sheared", "sheared + CPT", "random + CPT")


def evaluation(losses: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "parameters": 1000,
            "non_embedding_parameters": 500,
            "domains": {d: {"loss": loss, "tokens": 10} for d in ("docs", "stdlib")},
            "overall": {"loss": loss, "tokens": 20},
        }
        for name, loss in zip(NAMES, losses, strict=True)
    }


def test_claims_hold_exactly_when_the_losses_say_so() -> None:
    def holds(*losses: float) -> list[bool]:
        return [check.holds for check in loss_checks(evaluation(losses))]

    assert holds(2.0, 5.0, 4.0, 6.0) == [True, True]
    assert holds(2.0, 4.0, 5.0, 6.0) == [False, True]
    assert holds(2.0, 5.0, 4.0, 3.0) == [True, False]
    assert holds(2.0, 4.0, 4.0, 4.0) == [False, False]


def test_reload_check_compares_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")
    assert reload_check(folder).holds
    right = demo_report.load_model(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1.001
    save_file(tensors, file, metadata={"format": "pt"})
    monkeypatch.setattr(demo_report, "load_model", lambda path: right)
    assert not reload_check(folder).holds


def metrics(path: Path, shear: bool) -> None:
    path.mkdir(parents=True)
    lines = []
    for step in range(1, 7):
        record: dict[str, Any] = {
            "step": step,
            "tokens": 128 * step,
            "loss": 5 - 0.1 * step,
            "domain_weights": {"docs": 0.5, "stdlib": 0.5},
        }
        if step % 3 == 0:
            record["held_out"] = {"docs": {"loss": 4.0, "tokens": 10}}
        if shear:
            for family in ("hidden", "intermediate"):
                record |= {f"alive_{family}{end}": 30 - step for end in ("", "_min", "_max")}
                record[f"target_{family}"] = 24
        lines.append(json.dumps(record))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("random_loss", "status"), [(6.0, 0), (3.0, 1)])
def test_report_is_written_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], random_loss: float, status: int
) -> None:
    for name in ("shear", "cpt", "random"):
        metrics(tmp_path / name, shear=name == "shear")
    model = write_model(tmp_path / "model")
    results = Results(
        settings={
            "precision": "fp32",
            "target": "layers=1",
            **dict.fromkeys(("shear_lr", "cpt_lr", "random_lr"), 1e-4),
        },
        models=dict.fromkeys(NAMES, model),
        evaluation=evaluation((2.0, 5.0, 4.0, random_loss)),
        generation={n: {"tokens_per_second": 9.0, "continuation": "[bold] text"} for n in NAMES},
        prompt="the mask",
        runs={name: tmp_path / name for name in ("shear", "cpt", "random")},
    )
    folder = tmp_path / "report"
    folder.mkdir()
    torch.manual_seed(0)
    demo_report.write(results, folder)
    assert demo_report.show(folder) == status
    shown = capsys.readouterr().out
    for words in ("sheared + CPT", "4.000", "768 tokens", "[bold] text", str(model)):
        assert words.replace(" ", "") in shown.replace(" ", "").replace("\n", ""), words
    for name in ("alive_units.png", "domain_weights.png", "losses.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_line_at_the_target_marks_where_every_row_stays_on_it() -> None:
    rows = [(30, 30, 28), (24, 25, 24), (24, 24, 24), (23, 24, 24), (24, 24, 24), (24, 24, 24)]
    records = [
        {"step": step, "alive_hidden_min": low, "alive_hidden_max": high, "target_hidden": target}
        for step, (low, high, target) in enumerate(rows, start=1)
    ]
    assert plots.first_step_on_target(records, ["hidden"]) == 5
    assert plots.first_step_on_target(records[:4], ["hidden"]) is None


def test_held_out_mean_is_token_weighted() -> None:
    rows = {"a": {"loss": 1.0, "tokens": 30}, "b": {"loss": 3.0, "tokens": 10}}
    assert plots.mean_loss(rows) == pytest.approx(1.5)
