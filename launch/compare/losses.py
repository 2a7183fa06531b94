"""Held-out losses of pruning methods: the rows of a comparison, its results and its table."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from data.errors import InputError
from data.log import logger
from data.tables import millions, print_table
from launch.compare.config import (
    METHODS,
    OPTIONAL,
    OURS,
    TARGETS,
    CompareConfig,
    Method,
    methods_of,
    targets_of,
)
from launch.compare.stages import EVALUATION, StageMaker, read_result
from launch.stages import Plan, Task, announce
from pruner.budget import BLOCK_PARAMETERS
from pruner.shapes import Shape, config_of, example_shape, parse_target, shape_of
from pruner.shorten.config import ShortenConfig
from pruner.shorten.ranking import removable
from trainer.models.config import ModelConfig

CLOSE = 0.02
"""Relative difference of parameters up to which whole blocks match a target closely."""
ALL = "all"
"""Name of the mean over domains among the domains."""
BEYOND = {
    True: "more than the spread over seeds",
    False: "not more than the spread over seeds",
    None: "one seed: no spread",
}
_COUNTS = {"steps": int, "tokens": int}
_PRUNED = _COUNTS | {
    "target_shape": dict,
    "parameters": {"target_non_embedding": int},
    "kept_not_alive": {"*": int},
}
_TRAINED = _COUNTS
_MEASURED = {
    "domains": {"*": {"loss": float}},
    "text?": {"perplexity": (float, type(None))},
    "tasks?": {"*": {"metric": str, "of?": str}},
    "task_sets?": {"*": {"average": (float, type(None)), "average_stderr": (float, type(None))}},
}
"""What the results of stages must hold."""
WINDOW = 2048
"""Tokens that models see at once of --text, if they have as many positions."""
WIDTH = 150
"""Columns of the table where there is no terminal."""


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one target and seed, and the stages that make it."""

    target: str
    method: Method
    seed: int
    shear: Task
    cpt: Task
    pruned: Task | None
    """Measures the pruned model; None from scratch."""
    trained: Task
    """Measures the trained model."""

    def needs(self) -> set[str]:
        """Names of the stages that give the row's numbers."""
        measured = {self.trained.name} | ({self.pruned.name} if self.pruned else set())
        return measured | {self.shear.name}


def losses_plan(maker: StageMaker, source: ModelConfig) -> Plan:
    """Rows seed by seed, so that a table of all methods is there early.

    Raises InputError for a target that the source cannot give, and for whole blocks of a source
    that has a single one.
    """
    config = maker.config
    shapes = {
        name: _target_shape(source, name, sizes) for name, sizes in targets_of(config).items()
    }
    whole = [method.name for method in methods_of(config) if method.whole_blocks]
    if whole and source.num_layers == 1:
        others = " ".join(name for name in METHODS if name not in whole)
        raise InputError(
            f"--methods {whole[0]}: {config.source} has a single block, which cannot be removed; "
            f"leave it out: --methods {others}"
        )
    _describe(config, source, shapes)
    tasks = {task.name: task for task in maker.inputs()}
    measured = maker.measure("source", None, "measure source", window=window_of(source))
    tasks[measured.name] = measured
    rows = []
    for seed in config.seeds:
        for target, shape in shapes.items():
            for method in methods_of(config):
                row = _row(maker, source, target, shape, method, seed)
                rows.append(row)
                for task in (row.shear, row.pruned, row.cpt, row.trained):
                    if task is not None:
                        tasks.setdefault(task.name, task)
    results = partial(results_of, config, source, shapes, rows, measured)
    return Plan(list(tasks.values()), results, print_results)


def window_of(source: ModelConfig) -> int:
    """Tokens that models see at once of --text."""
    return min(WINDOW, source.max_position_embeddings)


def block_count(source: ModelConfig, parameters: int) -> int:
    """The number of the source's blocks, at least 1 and fewer than all, whose parameters without
    embeddings come nearest to `parameters`."""
    return min(
        range(1, source.num_layers),
        key=lambda layers: abs(_non_embedding(source, _blocks(source, layers)) - parameters),
    )


def _target_shape(source: ModelConfig, name: str, sizes: str) -> Shape:
    try:
        shape = parse_target(sizes, shape_of(source))
        config_of(shape, source).to_hf()
    except InputError as error:
        if TARGETS.get(name) == sizes:
            raise InputError(
                f"--targets {name} ({sizes}) is made for SmolLM2-135M and does not fit this source "
                f"({shape_of(source).describe()}): name shapes that do, for example --targets "
                f"small={example_shape(shape_of(source))}"
            ) from None
        raise InputError(f"--targets {name}: {error}") from None
    return shape


def _blocks(source: ModelConfig, layers: int) -> Shape:
    return parse_target(f"layers={layers}", shape_of(source))


def _non_embedding(source: ModelConfig, shape: Shape) -> int:
    return config_of(shape, source).num_parameters(embeddings=False)


def _shape(source: ModelConfig, target: Shape, method: Method) -> Shape:
    """The shape that `method` prunes to for a target."""
    if not method.whole_blocks:
        return target
    return _blocks(source, block_count(source, _non_embedding(source, target)))


def _row(
    maker: StageMaker,
    source: ModelConfig,
    target: str,
    shape: Shape,
    method: Method,
    seed: int,
) -> Row:
    common = f"{target}/{method.prunes_as or method.name}"
    common += f"/seed-{seed}" if method.seeded else ""
    own = f"{target}/{method.name}/seed-{seed}"
    sizes = _shape(source, shape, method).describe()
    if method.searched:
        sizes = f"{BLOCK_PARAMETERS}={_non_embedding(source, shape)}"
    kind = f"{target} {'learned' if method.shear_steps else 'at once'}"
    shear_seed = seed if method.seeded else 0
    if method.shorten_flags is None:
        shear = maker.shear(f"{common}/shear", sizes, method, shear_seed, f"shear {kind}")
    else:
        removed = source.num_layers - _shape(source, shape, method).layers
        _require_removable(source, removed, method)
        shear = maker.shorten(f"{common}/shear", removed, method, shear_seed, f"shorten {target}")
    pruned = maker.measure(f"{common}/pruned", shear, f"measure {target}")
    cpt = maker.train(f"{own}/cpt", shear, method, seed, f"cpt {target} {method.name}")
    trained = maker.measure(f"{own}/trained", cpt, f"measure {target}", window=window_of(source))
    return Row(target, method, seed, shear, cpt, None if method.random else pruned, trained)


def _require_removable(source: ModelConfig, removed: int, method: Method) -> None:
    """Raises InputError where `shorn shorten` protects more blocks than it may."""
    options = ShortenConfig(remove=removed)
    first, last = options.protect_first, options.protect_last
    if removed > len(removable(source.num_layers, first, last)):
        raise InputError(
            f"--methods {method.name}: takes {removed} of {source.num_layers} blocks, and `shorn "
            f"shorten` leaves the first {first} and the last {last} in place; leave it out"
        )


def _describe(config: CompareConfig, source: ModelConfig, shapes: dict[str, Shape]) -> None:
    whole = source.num_parameters(embeddings=False)
    tokens = config.batch * config.seq_len
    announce(
        f"{config.source}: {millions(whole)} parameters without embeddings; every method trains "
        f"on {config.steps * tokens:,} tokens, {len(config.seeds)} seeds"
    )
    for name, target in shapes.items():
        wanted = _non_embedding(source, target)
        logger.info(
            f"{name}: {target.describe()}, {millions(wanted)} ({100 * wanted / whole:.1f}%)"
        )
        for method in methods_of(config):
            if method.whole_blocks:
                blocks = _shape(source, target, method)
                found = _non_embedding(source, blocks)
                apart = found / wanted - 1
                note = "" if abs(apart) <= CLOSE else "; no number of blocks comes closer"
                logger.info(
                    f"{name}, {method.name}: {blocks.layers} of {source.num_layers} blocks, "
                    f"{found / 1e6:.2f}M ({100 * apart:+.1f}% of the target's{note})"
                )


def results_of(
    config: CompareConfig,
    source: ModelConfig,
    shapes: dict[str, Shape],
    rows: list[Row],
    measured: Task,
    done: set[str],
) -> dict[str, Any] | None:
    """The numbers of the rows whose stages are `done`, and their spread; None while there is
    nothing."""
    finished = [_numbers(config, row) for row in rows if row.needs() <= done]
    if not finished or measured.name not in done:
        return None
    tokens = config.batch * config.seq_len
    summary = summaries(finished)
    return {
        "source": config.source,
        "source_non_embedding_parameters": source.num_parameters(embeddings=False),
        "source_held_out": _losses(measured),
        "source_text": _perplexity(measured),
        "source_tasks": _accuracy(measured),
        "tokens": config.steps * tokens,
        "tokens_per_step": tokens,
        "targets": {name: shape.describe() for name, shape in shapes.items()},
        "rows": finished,
        "summary": summary,
        "leads": leads(finished),
        "missing_rows": len(rows) - len(finished),
    }


def _numbers(config: CompareConfig, row: Row) -> dict[str, Any]:
    report = read_result(row.shear, "shear.json", _PRUNED)
    trained = read_result(row.cpt, "cpt.json", _TRAINED)
    trained_as = read_result(row.cpt, "run.json", {"distill.weight?": float})
    # From scratch, nothing that shearing learned is used.
    learned, fed = (0, 0) if row.method.random else (report["steps"], report["tokens"])
    steps, tokens = learned + trained["steps"], fed + trained["tokens"]
    expected = config.steps * config.batch * config.seq_len
    if (steps, tokens) != (config.steps, expected):
        folders = dict.fromkeys(str(task.folder.parent) for task in (row.shear, row.cpt))
        raise InputError(
            f"{row.cpt.folder} and what it starts from took {steps} steps and {tokens:,} tokens, "
            f"and every method must take {config.steps} and {expected:,}: delete "
            f"{' and '.join(folders)} and run this again"
        )
    return {
        "target": row.target,
        "method": row.method.name,
        "seed": row.seed,
        "shape": report["target_shape"],
        "non_embedding_parameters": report["parameters"]["target_non_embedding"],
        "shear_steps": learned,
        "cpt_steps": trained["steps"],
        "tokens": tokens,
        "refit": report.get("refit"),
        "distill_weight": trained_as.get("distill.weight", 0.0),
        "kept_not_alive": None if row.method.random else report["kept_not_alive"],
        "pruned": None if row.pruned is None else _losses(row.pruned),
        "trained": _losses(row.trained),
        "text": _perplexity(row.trained),
        "tasks": _accuracy(row.trained),
    }


def _losses(task: Task) -> dict[str, float]:
    """Held-out losses per domain, and their mean under ALL."""
    found = read_result(task, EVALUATION, _MEASURED)["domains"]
    losses = {name: values["loss"] for name, values in found.items()}
    return losses | {ALL: sum(losses.values()) / len(losses)}


def _perplexity(task: Task) -> float | None:
    """Perplexity per token of --text; None where there is none."""
    found = read_result(task, EVALUATION, _MEASURED).get("text")
    if found is None:
        return None
    # JSON knows no infinity.
    return math.inf if found["perplexity"] is None else float(found["perplexity"])


def _accuracy(task: Task) -> dict[str, dict[str, Any]] | None:
    """For every one of --tasks and the sets among them the metric that counts, its value and its
    standard error; None where there are none."""
    found = read_result(task, EVALUATION, _MEASURED)
    if "tasks" not in found:
        return None
    rows = {name: row for name, row in found["tasks"].items() if "of" not in row}
    accuracy = {
        name: _measured(row["metric"], row.get(row["metric"]), row.get(f"{row['metric']}_stderr"))
        for name, row in rows.items()
    }
    for name, entry in found.get("task_sets", {}).items():
        accuracy[name] = _measured("average", entry["average"], entry["average_stderr"])
    return accuracy


def _measured(metric: str, value: float | None, stderr: float | None) -> dict[str, Any]:
    return {"metric": metric, "value": value, "stderr": stderr}


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
        others = {
            name: grouped.get((target, name), {}) for name in (*METHODS, *OPTIONAL) if name != OURS
        }
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
