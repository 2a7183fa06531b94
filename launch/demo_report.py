"""The demo's last stage: checks, table, pictures and the text the user reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch import plots
from trainer.models.hf import load_model

LOGIT_TOLERANCE = 1e-5


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
    """Write FOLDER/report.json and the pictures."""
    checks = [*loss_checks(results.evaluation), reload_check(results.models["sheared + CPT"])]
    pictures = draw(results, folder)
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
        "tokens": trained_tokens(results),
        "held_out_tokens": results.evaluation["source"]["overall"]["tokens"],
        "checks": [{"claim": c.claim, "holds": c.holds, "numbers": c.numbers} for c in checks],
        "pictures": [str(path) for path in pictures],
        "model": str(results.models["sheared + CPT"]),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def trained_tokens(results: Results) -> dict[str, int]:
    """Training tokens of each run, as its metrics counted them."""
    metrics = {
        name: plots.read_metrics(run / "metrics.jsonl") for name, run in results.runs.items()
    }
    return {name: records[-1]["tokens"] for name, records in metrics.items()}


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
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, theirs.config.vocab_size, (2, 64), generator=generator)
    with torch.no_grad():
        expected = ours(ids)
        difference = (theirs(ids).logits - expected).abs().max() / expected.abs().max()
    return Check(
        "plain transformers reloads the model and computes the same logits",
        difference.item() <= LOGIT_TOLERANCE,
        f"largest difference {difference.item():.1e} of the largest logit",
    )


def draw(results: Results, folder: Path) -> list[Path]:
    """The three pictures: alive units, domain weights, losses."""
    shear, cpt, random = (
        plots.read_metrics(results.runs[name] / "metrics.jsonl")
        for name in ("shear", "cpt", "random")
    )
    lines = {
        "source": results.evaluation["source"]["overall"]["loss"],
        "sheared, before CPT": results.evaluation["sheared"]["overall"]["loss"],
    }
    curves = {"sheared": cpt, "random init": random}
    return [
        plots.plot_alive(shear, folder / "alive_units.png"),
        plots.plot_weights({"shearing": shear, "CPT": cpt}, folder / "domain_weights.png"),
        plots.plot_losses(shear, curves, lines, folder / "losses.png"),
    ]


def show(folder: Path) -> int:
    """Print the report; 0 when every check holds, else 1."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(_table(report))
    console.print(f"Prompt: {report['prompt']!r}. Continuations (greedy, repetition penalty 1.2):")
    for name, row in report["rows"].items():
        console.print(Text(f"  {name}: ", "bold") + Text(repr(row["continuation"]), "none"))
    for check in report["checks"]:
        mark = "yes" if check["holds"] else "NO "
        console.print(Text(f"{mark}  {check['claim']}: {check['numbers']}"))
    for picture in report["pictures"]:
        console.print(f"picture: {picture}", soft_wrap=True)
    console.print(f"Hugging Face folder: {report['model']}", soft_wrap=True)
    return 0 if all(check["holds"] for check in report["checks"]) else 1


def _table(report: dict[str, Any]) -> Table:
    tokens, settings = report["tokens"], report["settings"]
    caption = (
        f"Held-out loss in nats per token over {report['held_out_tokens']:,} tokens, "
        f"{settings['precision']}. Shearing saw {tokens['shear']:,} tokens "
        f"(lr {settings['shear_lr']:g}), continued pre-training {tokens['cpt']:,} "
        f"(lr {settings['cpt_lr']:g}) and the random model {tokens['random']:,} "
        f"(lr {settings['random_lr']:g}). Generation: greedy, batch 1, median."
    )
    table = Table(title="Demo", caption=caption)
    table.add_column("model", no_wrap=True)
    domains = list(report["rows"]["source"]["held_out"])
    for name in ("parameters", "w/o embed.", *domains, "all", "gen. tok/s"):
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
