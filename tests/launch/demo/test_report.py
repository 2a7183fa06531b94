"""The demo's report: claims follow the numbers, a wrong reload is caught, pictures are written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def write_run(path: Path, shear: bool) -> None:
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
            for kind in ("hidden", "intermediate"):
                record |= {f"alive_{kind}{end}": 30 - step for end in ("", "_min", "_max")}
                record[f"target_{kind}"] = 24
        lines.append(json.dumps(record))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2}
    sizes |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    identity: dict[str, Any] = {f"model.{name}": size for name, size in sizes.items()}
    identity |= {"model.family": "llama", "steps": 6, "target": "hidden=24,ffn=24"}
    identity["command"] = "shear" if shear else "cpt"
    identity["init"] = "random" if path.name == "random" else "pretrained"
    (path / "run.json").write_text(json.dumps(identity))


@pytest.mark.parametrize(("random_loss", "status"), [(6.0, 0), (3.0, 1)])
def test_report_is_written_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], random_loss: float, status: int
) -> None:
    for name in ("shear", "cpt", "random"):
        write_run(tmp_path / name, shear=name == "shear")
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
    report = json.loads((folder / "report.json").read_text())
    assert [Path(path).name for path in report["pictures"]] == [
        *("report.html", "units-that-are-on.png", "domains.png", "loss.png")
    ]
    assert all(Path(path).is_file() and path in shown for path in report["pictures"])
