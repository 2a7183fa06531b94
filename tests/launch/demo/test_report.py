"""The demo's report: claims follow the numbers, a wrong reload is caught, pictures are written."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from data.errors import InputError
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


def shown_report(**changes: Any) -> dict[str, Any]:
    """A report.json with four domains."""
    domains = ("stdlib", "headers", "reference", "docs")
    losses = dict(zip(NAMES, (2.614, 3.768, 3.444, 7.619), strict=True))
    rows = {
        name: {
            "parameters": 134_515_008,
            "non_embedding_parameters": 106_203_456,
            "held_out": dict.fromkeys(domains, loss),
            "overall": loss,
            "generation_tokens_per_second": 17.4,
            "continuation": "text",
        }
        for name, loss in losses.items()
    }
    report: dict[str, Any] = {"rows": rows, "prompt": "To", "held_out_tokens": 9, "checks": []}
    report |= {"settings": {"precision": "fp32", "target": "layers=1"}, "model": "m"}
    report["settings"] |= dict.fromkeys(("shear_lr", "cpt_lr", "random_lr"), 1e-4)
    report |= {"tokens": dict.fromkeys(("shear", "cpt", "random"), 5), "pictures": []}
    return report | changes


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_number_is_cut_on_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    report = shown_report()
    console = Console(width=width, file=io.StringIO())
    for table in demo_report._tables(report, console):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for number in ("134.5M", "106.2M", "2.614", "7.619", "17.4"):
        assert printed.count(number) >= 1, number
    assert "…" not in printed
    assert len(printed.split("model")) == (2 if width >= 120 else 3)


def test_models_of_one_shape_that_differ_in_speed_show_a_busy_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = {
        name: {"tokens_per_second": 1.0, "continuation": "", "seconds": [seconds] * 5}
        for name, seconds in zip(NAMES, (2.0, 17.4, 2.3, 2.4), strict=True)
    }
    sizes = evaluation((2.0, 5.0, 4.0, 6.0))
    sizes["source"]["parameters"] = 2000
    measured: dict[str, Any] = {"evaluation": sizes, "generation": generation}
    reason = demo_report.busy(Results(settings={}, models={}, prompt="", runs={}, **measured))
    assert reason is not None and "sheared and sheared + CPT, of one shape, differ" in reason
    (tmp_path / "report.json").write_text(json.dumps(shown_report(busy=reason)))
    demo_report.show(tmp_path)
    shown = capsys.readouterr().out
    assert "too busy to time" in shown and shown.count("too busy") >= 5 and "17.4" not in shown
    assert "took back 28% of the 1.154 nats" in shown


@pytest.mark.parametrize(
    "content", ["", "5", "[]", '{"rows": {}}', json.dumps(shown_report(rows={"source": 5}))]
)
def test_a_report_of_another_form_says_how_to_make_it_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=rf"report\.json: .*delete {tmp_path} and run the demo"):
        demo_report.show(tmp_path)


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
