"""The demo's last stage: checks, table, pictures and the text the user reads."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.files import write_json
from launch.demo.generation import silence_transformers
from launch.report import page
from launch.report.config import ReportConfig
from trainer.models.hf import load_model

LOGIT_TOLERANCE = 1e-5
PICTURES = ("units-that-are-on", "domains", "loss")
"""Groups of the page that are named among the results as files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What the stages before measured; models are keyed by the names of the table's rows."""

    settings: dict[str, Any]
    models: dict[str, Path]
    evaluation: dict[str, dict[str, Any]]
    """Output of `launch.evaluate --json` per model."""
    generation: dict[str, dict[str, Any]]
    """Output of compare_generation per model."""
    prompt: str
    runs: dict[str, Path]
    """Output folders of the runs "shear", "cpt" and "random"."""


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the result, with the numbers it rests on."""

    claim: str
    holds: bool
    numbers: str


def write(results: Results, folder: Path) -> None:
    """Write FOLDER/report.json, the page report.html and its pictures."""
    checks = [*loss_checks(results.evaluation), reload_check(results.models["sheared + CPT"])]
    runs = tuple(str(run) for run in results.runs.values())
    shown = ReportConfig(runs=runs, output=str(folder / "report.html"), figures=str(folder))
    facts = page.run(shown)
    rows = {
        name: {
            "parameters": row["parameters"],
            "non_embedding_parameters": row["non_embedding_parameters"],
            "held_out": {domain: v["loss"] for domain, v in row["domains"].items()},
            "overall": row["overall"]["loss"],
            "generation_tokens_per_second": results.generation[name]["tokens_per_second"],
            "continuation": results.generation[name]["continuation"],
        }
        for name, row in results.evaluation.items()
    }
    report = {
        "settings": results.settings,
        "rows": rows,
        "prompt": results.prompt,
        "tokens": dict(zip(results.runs, (run["tokens"] for run in facts["runs"]), strict=True)),
        "held_out_tokens": results.evaluation["source"]["overall"]["tokens"],
        "checks": [asdict(check) for check in checks],
        "pictures": [facts["page"], *(str(folder / f"{name}.png") for name in PICTURES)],
        "model": str(results.models["sheared + CPT"]),
    }
    write_json(folder / "report.json", report)


def loss_checks(evaluation: dict[str, dict[str, Any]]) -> list[Check]:
    """The two comparisons the demo is about, over all held-out tokens."""
    loss = {name: row["overall"]["loss"] for name, row in evaluation.items()}
    after, before, scratch = loss["sheared + CPT"], loss["sheared"], loss["random + CPT"]
    return [
        Check(
            "continued pre-training lowered the held-out loss of the sheared model",
            after < before,
            f"{before:.3f} → {after:.3f}",
        ),
        Check(
            "the sheared model beats a random initialisation of its shape, trained the same",
            after < scratch,
            f"{after:.3f} against {scratch:.3f}",
        ),
    ]


def reload_check(folder: Path) -> Check:
    """Whether plain transformers computes the same logits from the folder as this package."""
    from transformers import AutoModelForCausalLM

    silence_transformers()
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    ours = load_model(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 64), generator=generator)
    with torch.no_grad():
        expected = ours(ids)
        difference = (theirs(ids).logits - expected).abs().max() / expected.abs().max()
    return Check(
        "plain transformers reloads the model and computes the same logits",
        difference.item() <= LOGIT_TOLERANCE,
        f"they differ by at most {difference.item():.1e} of the largest (limit {LOGIT_TOLERANCE})"
        if difference.item()
        else "not one bit differs",
    )


def show(folder: Path) -> int:
    """Print the report; 0 when every check holds, else 1."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    console = Console(width=None if Console().is_terminal else 120, highlight=False, markup=False)
    console.print(_table(report))
    for line in _explanations(report):
        console.print(line, soft_wrap=True)
    console.print(f"\nPrompt: {report['prompt']}\nContinuations (greedy, repetition penalty 1.2):")
    for name, row in report["rows"].items():
        words = " ".join(row["continuation"].split())
        console.print(Text(f"  {name}: ", "bold") + Text(f"… {words}", "none"))
    console.print("\nChecks:")
    for check in report["checks"]:
        mark = "passed" if check["holds"] else "FAILED"
        console.print(Text(f"  {mark}: {check['claim']}: {check['numbers']}"))
    console.print("\nPictures:")
    for picture in report["pictures"]:
        console.print(f"  {picture}", soft_wrap=True)
    load = f'AutoModelForCausalLM.from_pretrained("{report["model"]}")'
    console.print(f"\nLoad the model with plain transformers: {load}", soft_wrap=True)
    return 0 if all(check["holds"] for check in report["checks"]) else 1


def _table(report: dict[str, Any]) -> Table:
    table = Table(title="Held-out loss, nats per token (lower is better)")
    table.add_column("model", no_wrap=True)
    domains = list(report["rows"]["source"]["held_out"])
    sizes = ("parameters", "without\nembeddings")
    for name in (*sizes, *domains, "all\ntext", "generated\ntokens/s"):
        table.add_column(name, justify="right")
    for name, row in report["rows"].items():
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['non_embedding_parameters'] / 1e6:.1f}M",
            *(f"{row['held_out'][domain]:.3f}" for domain in domains),
            f"{row['overall']:.3f}",
            f"{row['generation_tokens_per_second']:.1f}",
        )
    return table


def _explanations(report: dict[str, Any]) -> list[str]:
    """What each row of the table is, and how its numbers were measured."""
    tokens, settings = report["tokens"], report["settings"]
    learned = {
        name: f"{tokens[name]:,} tokens at learning rate {settings[f'{name}_lr']:g}"
        for name in ("shear", "cpt", "random")
    }
    return [
        "  source: the model before anything was done to it",
        f"  sheared: cut to {settings['target']} after learning masks on {learned['shear']}",
        f"  sheared + CPT: that model after continued pre-training on {learned['cpt']}",
        f"  random + CPT: the same shape from random weights, trained on {learned['random']}",
        f"Losses: {report['held_out_tokens']:,} tokens of documents kept out of training, "
        f"{settings['precision']}. Speed: greedy, one sequence at a time, median of several runs.",
    ]
