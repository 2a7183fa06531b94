"""Kept units that are not on after shearing under both rules, at several sparsities."""

import math
from functools import partial
from typing import Any

from rich.table import Table

from data.errors import InputError
from data.log import logger
from data.tables import print_table
from launch.compare.config import CompareConfig, Method
from launch.compare.stages import StageMaker, read_result
from launch.stages import Plan, Task, announce
from pruner.shapes import Shape, config_of, shape_of, validate
from pruner.units import label
from trainer.models.config import ModelConfig

_COUNTS = {"*": [int]}
_REPORT = {
    "steps": int,
    "polarised": bool,
    "target": dict,
    "kept": _COUNTS,
    "alive": _COUNTS,
    "kept_not_alive": {"*": int},
    "families": {"*": {"rows": int, "target": int}},
}
RULES = ("projection", "paper")
"""Their names are part of the identities of finished stages, as `--rule paper` is."""


def sparse_shape(model: ModelConfig, sparsity: float) -> Shape:
    """The valid shape whose unit kinds come nearest to losing `sparsity` of their units each.

    The hidden size is a multiple of 16 and of the number of heads, the feed-forward size of 16,
    where the source is large enough; GPT-NeoX is as wide as its heads together. Raises InputError
    where no unit would go.
    """
    source = shape_of(model)
    keep = 1 - sparsity
    pairs = [
        (kv * group, kv)
        for kv in range(1, source.kv_heads + 1)
        for group in range(1, source.group + 1)
    ]
    heads, kv_heads = min(
        pairs,
        key=lambda pair: (
            abs(pair[0] - source.heads * keep),
            abs(pair[1] - source.kv_heads * keep),
        ),
    )
    step = math.lcm(16, heads)
    hidden = _multiple(source.hidden, keep, step if step <= source.hidden else heads)
    target = Shape(
        layers=max(1, round(source.layers * keep)),
        hidden=hidden if "head_dim" in model.traits.keys else heads * source.head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=source.head_dim,
        ffn=_multiple(source.ffn, keep, 16),
    )
    try:
        validate(target, source)
        config_of(target, model).to_hf()
    except InputError as error:
        raise InputError(f"--sparsities {sparsity:g}: {error}") from None
    return target


def _multiple(units: int, keep: float, step: int) -> int:
    if step > units:
        step = 1
    return max(step, round(units * keep / step) * step)


def dead_units_plan(maker: StageMaker, source: ModelConfig) -> Plan:
    """One shearing run for every seed, sparsity and rule."""
    config = maker.config
    tasks = {task.name: task for task in maker.inputs()}
    runs = []
    announce(
        f"{config.source}: kept and on units after {config.shear_steps} steps under both rules"
    )
    for sparsity in config.sparsities:
        shape = sparse_shape(source, sparsity)
        logger.info(f"{100 * sparsity:g}% of every unit kind: {shape.describe()}")
    for seed in config.seeds:
        for sparsity in config.sparsities:
            sizes = sparse_shape(source, sparsity).describe()
            for rule in RULES:
                method = Method(rule, config.shear_steps, ("--rule", rule))
                name = f"dead-units/{100 * sparsity:g}/{rule}/seed-{seed}"
                task = maker.shear(name, sizes, method, seed, f"shear {sparsity}")
                tasks[task.name] = task
                runs.append((sparsity, rule, seed, task))
    return Plan(list(tasks.values()), partial(results_of, config, runs), print_results)


def results_of(
    config: CompareConfig, runs: list[tuple[float, str, int, Task]], done: set[str]
) -> dict[str, Any] | None:
    """Unit counts of the finished runs, by row of each kind; None while there is none."""
    rows = []
    for sparsity, rule, seed, task in runs:
        if task.name in done:
            report = read_result(task, "shear.json", _REPORT)
            names = ("target", "kept", "alive", "kept_not_alive", "polarised", "families")
            row = {"sparsity": sparsity, "rule": rule, "seed": seed, "steps": report["steps"]}
            rows.append(row | {name: report[name] for name in names})
    return {"source": config.source, "rows": rows} if rows else None


def print_results(results: dict[str, Any]) -> None:
    """Kept units of every kind, those of them that are on, and the rest, over all rows."""
    table = Table(title="units over all rows: kept, of them on (z ≥ 0.99), and the rest")
    for heading in ("sparsity", "rule", "seed", "kind", "target", "kept", "on", "not on"):
        left = heading in ("rule", "kind")
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in results["rows"]:
        for name, sizes in row["families"].items():
            kept, on = sum(row["kept"][name]), sum(row["alive"][name])
            units = (sizes["target"] * sizes["rows"], kept, on, kept - on)
            words = (f"{100 * row['sparsity']:g}%", row["rule"], str(row["seed"]), label(name))
            table.add_row(*words, *(f"{value:,}" for value in units))
        table.add_section()
    print_table(table)
