"""The top of the page: what each line of runs has come to, and runs beside each other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from launch.report.lineage import Line, is_random, run_names, text_of
from launch.report.markup import Html, element, table
from launch.report.run_folder import held_out_of, mean_loss, newest, parameters
from trainer.verdict import (
    SHEARED,
    TRAINED,
    TUNED,
    Stage,
    conclude,
    losses_of,
    sizes_of,
    stages_of,
)


def verdict_sections(lines: Sequence[Line]) -> list[Html]:
    """A verdict on the last run of each line that did not start from random weights; and where
    there are several lines, all runs beside each other."""
    judged = [line for line in lines if not line.random] or list(lines)
    sections = [_verdict(line, len(judged) > 1) for line in judged]
    if len(lines) > 1:
        sections.append(_beside(lines))
    return [section for section in sections if section is not None]


def _verdict(line: Line, named: bool) -> Html | None:
    last = line.runs[-1]
    stages = stages_of(last.folder) if last.report is not None else _going_on(line)
    if not stages or not stages[-1].losses:
        return None
    weights = (last.report or {}).get("weights") or newest(last, "domain_weights")
    verdict = conclude(stages, weights)
    title = "Verdict" + (f": {line.name}" if named else "")
    if last.report is None:
        title += f" so far, at step {last.step:,} of {last.steps:,}"
    lines = [element("p", text) for text in verdict.lines]
    return element("section", element("h2", title), table(verdict.header, verdict.rows), *lines)


def _going_on(line: Line) -> list[Stage]:
    """The stages up to a run that is not finished, which is the last of its line."""
    last = line.runs[-1]
    parent = line.runs[-2] if len(line.runs) > 1 else line.after
    before = stages_of(parent.folder) if parent is not None else []
    keys = ("data", "seq_len")
    on: dict[str, Any] = {key: last.identity[key] for key in keys if key in last.identity}
    known = len(on) == len(keys)
    if last.identity.get("documents") == "apart":
        on["documents"] = "apart"
    called = {"shear": SHEARED, "cpt": TRAINED, "finetune": TUNED}[last.command]
    losses = losses_of(held_out_of(last))
    now = Stage(
        called,
        str(last.folder / "model"),
        losses,
        on if known else None,
        sizes_of(last.model),
    )
    if last.command == "shear":
        # Its masks are not settled, so its size is not known.
        now = replace(now, parameters=None)
    return [*before, now]


def _beside(lines: Sequence[Line]) -> Html | None:
    """Every run's newest held-out losses, of those measured on the text of the first."""
    runs = [run for line in lines for run in line.runs]
    starts = [run for line in lines for run in (line.after, *line.runs[:-1])]
    found = [held_out_of(run) for run in runs]
    measured = [index for index, losses in enumerate(found) if losses]
    if not measured:
        return None
    first = measured[0]
    text = text_of(runs[first], found[first])
    domains = sorted(found[first])
    rows = []
    names = run_names(runs)
    called = {run.folder: name for run, name in zip(runs, names, strict=True)}
    for run, name, parent, losses in zip(runs, names, starts, found, strict=True):
        start = "random weights" if is_random(run) else str(run.identity.get("target", ""))
        if run.command != "shear" and parent is not None:
            start = f"model of {called[parent.folder]}"
        cells = ["not measured"] * (len(domains) + 1)
        if losses:
            cells = ["other text"] * (len(domains) + 1)
        if losses and text_of(run, losses) == text:
            cells = [f"{losses[domain]['loss']:.4f}" for domain in domains]
            cells.append(f"{mean_loss(losses):.4f}")
        counts = parameters(run)
        size = counts.get("target", counts["source"])
        rows.append((name, start, f"{run.step:,} of {run.steps:,}", f"{size:,}", *cells))
    header = ("run", "target or start", "steps", "parameters", *domains, "mean")
    words = (
        "Newest held-out loss of each run, nats per token. Other text: measured on other sequences "
        "than the first run, which does not compare."
    )
    return element(
        "section", element("h2", "Runs beside each other"), element("p", words), table(header, rows)
    )
