"""The table of a comparison: means and spreads over seeds, and who leads."""

from typing import Any

from rich.console import Console
from rich.table import Table

from data.tables import millions, print_table
from launch.compare.config import METHODS, OPTIONAL, OURS

BEYOND = {
    True: "more than the spread over seeds",
    False: "not more than the spread over seeds",
    None: "one seed: no spread",
}
WIDTH = 150
"""Columns of the table where there is no terminal."""


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every target and method, in the order of `rows`: mean, min and max over the seeds of the
    losses before and after training, per domain, of the perplexity of --text and of --tasks, with
    the mean of their standard errors: all seeds answer the same questions."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["target"], row["method"]), []).append(row)
    found = []
    for (target, method), members in grouped.items():
        entry: dict[str, Any] = {"target": target, "method": method}
        entry["seeds"] = [row["seed"] for row in members]
        entry["non_embedding_parameters"] = members[0]["non_embedding_parameters"]
        not_on = [row["kept_not_alive"] for row in members]
        entry["kept_not_alive"] = [sum(kinds.values()) for kinds in not_on if kinds is not None]
        for stage in ("pruned", "trained"):
            losses = [row[stage] for row in members if row[stage] is not None]
            entry[stage] = {
                domain: _spread([values[domain] for values in losses])
                for domain in (losses[0] if losses else ())
            }
        texts = [row["text"] for row in members if row["text"] is not None]
        entry["text"] = _spread(texts) if texts else None
        entry["tasks"] = _task_spreads([row["tasks"] for row in members if row["tasks"]])
        found.append(entry)
    return found


def _task_spreads(rows: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]] | None:
    """Per task; one that a model's damaged weights give no value for is left out."""
    found = {}
    for name in rows[0] if rows else ():
        values = [row[name]["value"] for row in rows]
        errors = [row[name]["stderr"] for row in rows]
        if None not in values:
            stderr = None if None in errors else sum(errors) / len(errors)
            found[name] = {"metric": rows[0][name]["metric"], **_spread(values), "stderr": stderr}
    return found if rows else None


def leads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per target and domain, how far `ours` lies below the best other method after training, in
    the mean over the seeds that both have, and whether the losses of the two do not overlap over
    those seeds: None for a single one. Variants are no others.
    """
    grouped: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        grouped.setdefault((row["target"], row["method"]), {})[row["seed"]] = row["trained"]
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        ours = grouped.get((target, OURS), {})
        foreign = [row["method"] for row in rows if row.get("folder") is not None]
        names = dict.fromkeys((*METHODS, *OPTIONAL, *foreign))
        others = {name: grouped.get((target, name), {}) for name in names if name != OURS}
        shared = {name: theirs for name, theirs in others.items() if theirs.keys() & ours.keys()}
        for domain in next(iter(ours.values())) if shared else ():
            compared = [_lead(ours, theirs, domain) for theirs in shared.values()]
            named = zip(shared, compared, strict=True)
            best, lead = min(named, key=lambda entry: entry[1]["lower_by"])
            found.append({"target": target, "domain": domain, "best_other": best, **lead})
    return found


def _lead(
    ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]], domain: str
) -> dict[str, Any]:
    seeds = [seed for seed in ours if seed in theirs]
    own = _spread([ours[seed][domain] for seed in seeds])
    rival = _spread([theirs[seed][domain] for seed in seeds])
    apart = own["max"] < rival["min"] or rival["max"] < own["min"]
    return {
        "seeds": seeds,
        "lower_by": rival["mean"] - own["mean"],
        "beyond_spread": apart if len(seeds) > 1 else None,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def print_results(results: dict[str, Any]) -> None:
    """A table for each target: mean and extremes of every method's losses."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    domains = list(results["source_held_out"])
    for target, shape in results["targets"].items():
        entries = [entry for entry in results["summary"] if entry["target"] == target]
        if not entries:
            continue
        table = Table(title=f"{target}: {shape}; held-out loss, mean (min..max over seeds)")
        text = [] if results.get("source_text") is None else ["text\n(perplexity)"]
        tasks = results.get("source_tasks") or {}
        columns = [*domains, *text, *(f"{name}\n({row['metric']})" for name, row in tasks.items())]
        for heading in ("method", "without\nembeddings", "not on", "after", *columns):
            left = heading in ("method", "after")
            table.add_column(heading, justify="left" if left else "right")
        whole = results["source_non_embedding_parameters"]
        source = [f"{loss:.3f}" for loss in results["source_held_out"].values()]
        source += [f"{results['source_text']:.2f}"] if text else []
        source += [_value(row["value"], row["stderr"]) for row in tasks.values()]
        table.add_row("source", millions(whole), "", "", *source, end_section=True)
        for entry in entries:
            _add_rows(table, entry, domains, list(tasks))
        print_table(table, console)
        for lead in results["leads"]:
            if lead["target"] == target:
                console.print(
                    f"{lead['domain']}: {OURS} is {abs(lead['lower_by']):.3f} "
                    f"{'below' if lead['lower_by'] >= 0 else 'above'} the best other, "
                    f"{lead['best_other']}, {BEYOND[lead['beyond_spread']]}",
                    highlight=False,
                )
    if results["missing_rows"]:
        console.print(f"{results['missing_rows']} rows are not finished")


def _add_rows(table: Table, entry: dict[str, Any], domains: list[str], tasks: list[str]) -> None:
    size = millions(entry["non_embedding_parameters"])
    not_on = entry["kept_not_alive"]
    span = _range(min(not_on), max(not_on), "d") if not_on else ""
    first = (entry["method"], size, span)
    for stage in ("pruned", "trained"):
        if entry[stage]:
            cells = [_cell(entry[stage][domain]) for domain in domains]
            if stage == "trained" and entry.get("text"):
                cells.append(_cell(entry["text"]))
            if stage == "trained" and entry.get("tasks"):
                cells += [_task_cell(entry["tasks"].get(name)) for name in tasks]
            words = {"pruned": "pruning", "trained": "training"}[stage]
            table.add_row(*first, words, *cells, end_section=stage == "trained")
            first = ("", "", "")


def _cell(spread: dict[str, float]) -> str:
    extremes = _range(spread["min"], spread["max"], ".2f")
    return f"{spread['mean']:.3f} ({extremes})"


def _task_cell(spread: dict[str, Any] | None) -> str:
    if spread is None:
        return "nan"
    extremes = _range(spread["min"], spread["max"], ".2f")
    return f"{_value(spread['mean'], spread['stderr'])} ({extremes})"


def _value(value: float | None, stderr: float | None) -> str:
    error = "" if stderr is None else f" ±{stderr:.3f}"
    return "nan" if value is None else f"{value:.3f}{error}"


def _range(low: float, high: float, form: str) -> str:
    return f"{low:{form}}" if low == high else f"{low:{form}}..{high:{form}}"
