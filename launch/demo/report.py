"""The demo's last stage: checks, table, pictures and the text the user reads."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.errors import InputError
from data.files import write_json
from data.records import fits, read_json
from data.tables import millions, print_table
from launch.demo.generation import silence_transformers
from launch.report import page
from launch.report.config import ReportConfig
from pruner.timing import Timing, too_busy
from trainer.models.hf import load_model
from trainer.verdict import LEAST_GAP

LOGIT_TOLERANCE = 1e-5
WIDEST = 1000
"""Columns in which any table is as wide as it needs to be."""
_LOSS = {"loss": float}
EVALUATION = {
    "parameters": int,
    "non_embedding_parameters": int,
    "domains": {"*": _LOSS},
    "overall": {"loss": float, "tokens": int},
}
"""What `launch.evaluate --json` must hold."""
GENERATION = {"tokens_per_second": float, "continuation": str, "seconds?": [float]}
"""What compare_generation must say of a model."""
_ROW = {
    "parameters": int,
    "non_embedding_parameters": int,
    "held_out": {"*": float},
    "overall": float,
    "generation_tokens_per_second": float,
    "continuation": str,
}
_REPORT = {
    "settings": {"precision": str, "target": str}
    | dict.fromkeys(("shear_lr", "cpt_lr", "random_lr"), float),
    "rows": {"source": _ROW, "sheared": _ROW, "sheared + CPT": _ROW, "random + CPT": _ROW},
    "prompt": str,
    "tokens": dict.fromkeys(("shear", "cpt", "random"), int),
    "held_out_tokens": int,
    "checks": [{"claim": str, "holds": bool, "numbers": str}],
    "pictures": [str],
    "model": str,
    "busy?": (str, type(None)),
}
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
        "busy": busy(results),
        "held_out_tokens": results.evaluation["source"]["overall"]["tokens"],
        "checks": [asdict(check) for check in checks],
        "pictures": [facts["page"], *(str(folder / f"{name}.png") for name in PICTURES)],
        "model": str(results.models["sheared + CPT"]),
    }
    write_json(folder / "report.json", report)


def read_results(path: Path, form: dict[str, Any]) -> dict[str, Any]:
    """The JSON file of a finished stage, which must have `form` (`data.records.fits`).

    Raises InputError, saying how to have it made again.
    """
    fix = f"delete {path.parent} and run the demo again"
    content: dict[str, Any] = read_json(path, fix)
    if not fits(content, form):
        raise InputError(f"{path}: holds other results than those of this version; {fix}")
    return content


def busy(results: Results) -> str | None:
    """Why the speeds of the models cannot be believed; None when they can, or nothing is known."""
    timings = {
        name: Timing(tuple(row["seconds"]))
        for name, row in results.generation.items()
        if row.get("seconds")
    }
    shapes = {name: results.evaluation[name]["parameters"] for name in timings}
    return too_busy(timings, shapes)


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
    report = read_results(folder / "report.json", _REPORT)
    console = Console(width=None if Console().is_terminal else 120, highlight=False, markup=False)
    for table in _tables(report, console):
        print_table(table, console)
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


def _tables(report: dict[str, Any], console: Console) -> list[Table]:
    """The results in one table, or in two where one is too wide for the terminal."""
    rows = report["rows"]
    domains = list(rows["source"]["held_out"])
    busy = report.get("busy") is not None
    sizes = {
        "parameters": [millions(row["parameters"]) for row in rows.values()],
        "without\nembeddings": [millions(row["non_embedding_parameters"]) for row in rows.values()],
    }
    losses = {
        domain: [f"{row['held_out'].get(domain, float('nan')):.3f}" for row in rows.values()]
        for domain in domains
    } | {"all\ntext": [f"{row['overall']:.3f}" for row in rows.values()]}
    speed = {
        "generated\ntokens/s": [
            "too busy" if busy else f"{row['generation_tokens_per_second']:.1f}"
            for row in rows.values()
        ]
    }
    title = "Held-out loss, nats per token (lower is better)"
    whole = _table(title, list(rows), sizes | losses | speed)
    if Console(width=WIDEST).measure(whole).maximum <= console.width:
        return [whole]
    return [_table(title, list(rows), losses), _table("Size and speed", list(rows), sizes | speed)]


def _table(title: str, names: list[str], columns: dict[str, list[str]]) -> Table:
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", overflow="fold")
    for index, name in enumerate(names):
        table.add_row(name, *(cells[index] for cells in columns.values()))
    return table


def _explanations(report: dict[str, Any]) -> list[str]:
    """What each row of the table is, and how its numbers were measured."""
    tokens, settings = report["tokens"], report["settings"]
    learned = {
        name: f"{tokens[name]:,} tokens at learning rate {settings[f'{name}_lr']:g}"
        for name in ("shear", "cpt", "random")
    }
    overall = {name: row["overall"] for name, row in report["rows"].items()}
    gap = overall["sheared"] - overall["source"]
    lines = [
        "  source: the model before anything was done to it",
        f"  sheared: cut to {settings['target']} after learning masks on {learned['shear']}",
        f"  sheared + CPT: that model after continued pre-training on {learned['cpt']}",
        f"  random + CPT: the same shape from random weights, trained on {learned['random']}",
        f"Losses: {report['held_out_tokens']:,} tokens of documents kept out of training, "
        f"{settings['precision']}. Speed: greedy, one sequence at a time, median of several runs.",
    ]
    if gap >= LEAST_GAP:
        closed = (overall["sheared"] - overall["sheared + CPT"]) / gap
        lines.append(f"Training took back {closed:.0%} of the {gap:.3f} nats that shearing lost.")
    if report.get("busy"):
        lines.append(f"Speed: {report['busy']}. Run it again on a quiet machine.")
    return lines
