"""What `python -m launch.evaluate` prints: one model's numbers, or several models side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table

from data.log import logger
from data.tables import print_table
from launch.evaluate.tasks import metrics_of
from trainer.verdict import LEAST_GAP

TASK_CELL = len("0.4750 ± 0.0800")
"""Characters of a task's value, and of the lines of a model's name above it."""
BOS_WORDS = {
    "no": "none",
    "yes": "one in front of the document",
    "every": "one in front of every window",
}


def print_results(names: Sequence[str], results: list[dict[str, Any]], busy: str | None) -> None:
    """Prints what was measured of the models called `names`; `busy` says why not to believe the
    times."""
    console = Console(highlight=False, markup=False)
    curve = [result for result in results if "step" in result]
    folders = results[: len(results) - len(curve)]
    if len(results) == 1 and folders:
        _print_one(console, results[0])
    elif curve:
        print_table(_curve(names, results), console)
    else:
        _print_several(console, names, results)
    if "tasks" in results[0] and not curve:
        print_table(_task_table(names, results), console)
    missing = results[0].get("missing")
    if missing:
        console.print(
            f"no {results[0]['split']} text to measure: {', '.join(missing)}", soft_wrap=True
        )
    if busy is not None:
        logger.warning(f"{busy}; measure again on a quiet machine")


def _print_one(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['model']}: {result['parameters']:,} parameters, "
        f"{result['non_embedding_parameters']:,} without embeddings, {result['precision']}",
        soft_wrap=True,
    )
    if "domains" in result:
        table = Table(title=_title(result))
        table.add_column("domain", overflow="fold")
        for name in ("loss", "perplexity", "target tokens"):
            table.add_column(name, justify="right")
        for name, row in (*result["domains"].items(), ("overall", result["overall"])):
            found = math.inf if row["perplexity"] is None else row["perplexity"]
            values = (f"{row['loss']:.4f}", f"{found:.3f}", f"{row['tokens']:,}")
            table.add_row(name, *values)
        print_table(table, console)
    for score in texts_of(result).values():
        stride = score["stride"] or f"none (windows of {score['window']} side by side)"
        whole = "; whole ones alone" if score.get("whole_windows") else ""
        table = Table(title=f"document {score['file']}", show_header=False)
        for name, value in (
            ("perplexity", f"{score['perplexity']:.4f}"),
            ("bits per byte", f"{score['bits_per_byte']:.4f}"),
            ("window", str(score["window"])),
            ("stride", f"{stride}{whole}"),
            ("BOS", BOS_WORDS[score["bos"]]),
            ("tokens", f"{score['tokens']:,}"),
            ("targets", f"{score['targets']:,}"),
        ):
            table.add_row(name, value)
        print_table(table, console)
    if "decoding" in result:
        console.print(f"decoding: {_pace(result)}", soft_wrap=True)


def texts_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores of the texts of --text, by name."""
    if "text" in result:
        return {result["text"]["file"]: result["text"]}
    found: dict[str, dict[str, Any]] = result.get("texts", {})
    return found


def _title(result: dict[str, Any]) -> str:
    return f"{result['split']} tokens, {result['seq_len']} per sequence"


def _print_several(console: Console, names: Sequence[str], results: list[dict[str, Any]]) -> None:
    """A column for every model: all were measured on the same sequences."""
    first = results[0]
    title = "compared"
    if "domains" in first:
        title = f"loss on {_title(first)}, {first['overall']['tokens']:,} targets"
    table = Table(title=title)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")

    for domain in first.get("domains", ()):
        table.add_row(domain, *(f"{one['domains'][domain]['loss']:.4f}" for one in results))
    if "domains" in first:
        losses = [one["overall"]["loss"] for one in results]
        table.add_row("overall", *(f"{loss:.4f}" for loss in losses))
        table.add_row("above the first", *(f"{loss - losses[0]:+.4f}" for loss in losses))
        gap = losses[1] - losses[0]
        if len(losses) > 2 and gap >= LEAST_GAP:
            shares = (f"{(losses[1] - loss) / gap:.0%}" for loss in losses[2:])
            table.add_row("gap of the second closed", "", "", *shares)
    for text in texts_of(first):
        scores = [texts_of(one)[text] for one in results]
        name = _labels(first)[text]
        if _same_tokens(scores):
            table.add_row(f"perplexity of {name}", *(f"{one['perplexity']:.4f}" for one in scores))
        if _same_text(scores):
            bits = (f"{score['bits_per_byte']:.4f}" for score in scores)
            table.add_row(f"bits per byte of {name}", *bits)
    table.add_section()
    table.add_row("parameters", *(f"{one['parameters']:,}" for one in results))
    blocks = (f"{one['non_embedding_parameters']:,}" for one in results)
    table.add_row("without embeddings", *blocks)
    if "decoding" in first:
        times = [one["decoding"] for one in results]
        table.add_row("ms per token", *(f"{1e3 * time['seconds']:.4g}" for time in times))
        table.add_row("spread of its rounds", *(f"{time['spread']:.0%}" for time in times))
        speeds = (f"{times[0]['seconds'] / time['seconds']:.2f}x" for time in times)
        table.add_row("speed", *speeds)
    print_table(table, console)


def _labels(result: dict[str, Any]) -> dict[str, str]:
    """What the texts are called: names of files, and whole paths where two have one name."""
    texts = list(texts_of(result))
    names = [Path(text).name for text in texts]
    pairs = zip(texts, names, strict=True)
    return {text: name if names.count(name) == 1 else text for text, name in pairs}


def _same_tokens(scores: list[dict[str, Any]]) -> bool:
    """Whether perplexities per token, of one text by several models, can be compared."""
    return len({score["tokens_sha256"] for score in scores}) == 1


def _same_text(scores: list[dict[str, Any]]) -> bool:
    """Whether bits per byte can: whole windows of other tokens end elsewhere in the text."""
    return _same_tokens(scores) or not any(score.get("whole_windows") for score in scores)


def _curve(names: Sequence[str], results: list[dict[str, Any]]) -> Table:
    """A row for every model and saved step: losses, perplexities, and of every task the metric that
    counts."""
    first = results[0]
    table = Table(title=f"loss on {_title(first)}" if "domains" in first else "learning curve")
    table.add_column("model", overflow="fold")
    table.add_column("tokens", justify="right")
    tasks = [name for name, row in first.get("tasks", {}).items() if "of" not in row]
    headings = ["overall", *first["domains"]] if "domains" in first else []
    labels = _labels(first)
    alike = [name for name in texts_of(first) if _same_tokens([texts_of(r)[name] for r in results])]
    headings += [f"perplexity of {labels[name]}" for name in alike]
    whole = [name for name in texts_of(first) if _same_text([texts_of(r)[name] for r in results])]
    headings += [f"bits per byte of {labels[name]}" for name in whole]
    headings += [f"{name} ({first['tasks'][name]['metric']})" for name in tasks]
    headings += [f"{name} (average)" for name in first.get("task_sets", {})]
    for heading in headings:
        table.add_column("\n".join(wrap(heading, TASK_CELL)), justify="right")
    for name, result in zip(names, results, strict=True):
        cells = [f"{result['overall']['loss']:.4f}"] if "overall" in result else []
        cells += [f"{row['loss']:.4f}" for row in result.get("domains", {}).values()]
        scores = texts_of(result)
        cells += [f"{scores[text]['perplexity']:.4f}" for text in alike]
        cells += [f"{scores[text]['bits_per_byte']:.4f}" for text in whole]
        rows = [result["tasks"][task] for task in tasks]
        values = [(row[row["metric"]], row.get(f"{row['metric']}_stderr")) for row in rows]
        sets = result.get("task_sets", {}).values()
        values += [(entry["average"], entry["average_stderr"]) for entry in sets]
        cells += [_cells([value])[0] for value in values]
        table.add_row(name, f"{result['tokens']:,}" if "step" in result else "", *cells)
    return table


def _task_table(names: Sequence[str], results: list[dict[str, Any]]) -> Table:
    """A row for every metric of every task, but for those within groups; of tasks that a set names
    the metric that counts alone."""
    first = results[0]["tasks"]
    apart = ", difference to the first" if len(results) > 1 else ""
    table = Table(title=f"tasks: value ± standard error{apart}")
    table.add_column("task")
    for heading in ("shots", "questions"):
        table.add_column(heading, justify="right")
    table.add_column("metric")
    for name in names if len(results) > 1 else ["value"]:
        # Names may be broken and numbers not, so no column folds.
        table.add_column("\n".join(wrap(name, TASK_CELL)), justify="right")
    for task, row in first.items():
        if "of" in row:
            continue
        facts = ["" if row[key] is None else str(row[key]) for key in ("shots", "n")]
        labels = [task, *facts]
        for metric in [row["metric"]] if "set" in row else metrics_of(row):
            rows = [one["tasks"][task] for one in results]
            cells = _cells([(row[metric], row.get(f"{metric}_stderr")) for row in rows])
            table.add_row(*labels, metric, *cells)
            labels = [""] * len(labels)
    for name, entry in results[0].get("task_sets", {}).items():
        table.add_section()
        sets = [one["task_sets"][name] for one in results]
        cells = _cells([(one["average"], one["average_stderr"]) for one in sets])
        table.add_row(f"{name}, {entry['tasks']} tasks", "", "", "average", *cells)
    return table


def _cells(found: list[tuple[float | None, float | None]]) -> list[str]:
    """Values with their standard errors and, from the second on, a line with the difference to the
    first."""
    cells: list[str] = []
    for value, error in found:
        text = "nan" if value is None else f"{value:.4f}"
        text += "" if error is None else f" ± {error:.4f}"
        first = found[0][0]
        if cells and value is not None and first is not None:
            text += f"\n{value - first:+.4f}"
        cells.append(text)
    return cells


def _pace(result: dict[str, Any]) -> str:
    found = result["decoding"]
    return (
        f"{1e3 * found['seconds']:.4g} ms per token, greedy at batch 1, median of "
        f"{found['rounds']} rounds (spread {found['spread']:.0%}), {found['threads']} threads"
    )
