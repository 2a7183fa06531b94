"""Held-out losses of pruning methods: the rows of a comparison, its results and its table."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.errors import InputError
from data.log import logger
from data.tables import millions
from launch.compare.config import (
    METHODS,
    TARGETS,
    CompareConfig,
    Method,
    methods_of,
    pruned_of,
    targets_of,
)
from launch.compare.stages import EVALUATION, StageMaker, read_result
from launch.compare.table import leads, print_results, summaries
from launch.stages import Plan, Task, announce
from pruner.budget import BLOCK_PARAMETERS
from pruner.shapes import Shape, config_of, example_shape, parse_target, shape_of
from pruner.shorten.config import ShortenConfig
from pruner.shorten.ranking import removable
from trainer.inputs import require_positions
from trainer.models.config import ModelConfig
from trainer.models.hf import load_config
from trainer.models.sources import resolve_model

CLOSE = 0.02
"""Relative difference of parameters up to which whole blocks match a target closely."""
ALL = "all"
"""Name of the mean over domains among the domains."""
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


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one target and seed, and the stages that make it."""

    target: str
    method: Method
    seed: int
    shear: Task | None
    """Prunes; None where another program did."""
    shape: ModelConfig | None
    """Of what another program has pruned."""
    cpt: Task
    pruned: Task | None
    """Measures the pruned model; None from scratch."""
    trained: Task
    """Measures the trained model."""

    def needs(self) -> set[str]:
        """Names of the stages that give the row's numbers."""
        measured = {self.trained.name} | ({self.pruned.name} if self.pruned else set())
        return measured | ({self.shear.name} if self.shear else set())


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
    foreign = _foreign(config, source)
    _describe(config, source, shapes, foreign)
    tasks = {task.name: task for task in maker.inputs()}
    measured = maker.measure("source", config.source, "measure source", window=window_of(source))
    tasks[measured.name] = measured
    rows = []
    for seed in config.seeds:
        for target, shape in shapes.items():
            rows += [
                _row(maker, source, target, shape, method, seed) for method in methods_of(config)
            ]
            rows += [_foreign_row(maker, target, *one, seed) for one in foreign[target]]
    for row in rows:
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
        removed = None
        if method.whole_blocks:
            removed = source.num_layers - _shape(source, shape, method).layers
            _require_removable(source, removed, method)
        shear = maker.shorten(f"{common}/shear", removed, method, shear_seed, f"shorten {target}")
    pruned = maker.measure(f"{common}/pruned", shear, f"measure {target}")
    cpt = maker.train(f"{own}/cpt", shear, method, seed, f"cpt {target} {method.name}")
    trained = maker.measure(f"{own}/trained", cpt, f"measure {target}", window=window_of(source))
    measured = None if method.random else pruned
    return Row(target, method, seed, shear, None, cpt, measured, trained)


def _foreign(
    config: CompareConfig, source: ModelConfig
) -> dict[str, list[tuple[Method, ModelConfig]]]:
    """The models of --pruned with their shapes, by target. Raises InputError for those that could
    not be trained as the others are."""
    found: dict[str, list[tuple[Method, ModelConfig]]] = {}
    for target, methods in pruned_of(config).items():
        found[target] = []
        for method in methods:
            assert method.folder is not None
            shape = load_config(resolve_model(method.folder, option="--pruned"))
            if shape.vocab_size != source.vocab_size:
                raise InputError(
                    f"--pruned {method.folder}: has {shape.vocab_size:,} token ids and the source "
                    f"{source.vocab_size:,}, of which it is taught; name a model that was cut from "
                    "it and kept its tokenizer"
                )
            require_positions(config.seq_len, shape)
            found[target].append((method, shape))
    return found


def _foreign_row(
    maker: StageMaker, target: str, method: Method, shape: ModelConfig, seed: int
) -> Row:
    """A row of --pruned, which is measured before training once for all seeds."""
    assert method.folder is not None
    common, own = f"{target}/{method.name}", f"{target}/{method.name}/seed-{seed}"
    pruned = maker.measure(f"{common}/pruned", method.folder, f"measure {target}")
    cpt = maker.train(f"{own}/cpt", method.folder, method, seed, f"cpt {target} {method.name}")
    window = min(WINDOW, shape.max_position_embeddings)
    trained = maker.measure(f"{own}/trained", cpt, f"measure {target}", window=window)
    return Row(target, method, seed, None, shape, cpt, pruned, trained)


def _require_removable(source: ModelConfig, removed: int, method: Method) -> None:
    """Raises InputError where `shorn shorten` protects more blocks than it may."""
    options = ShortenConfig(remove=removed)
    first, last = options.protect_first, options.protect_last
    if removed > len(removable(source.num_layers, first, last)):
        raise InputError(
            f"--methods {method.name}: takes {removed} of {source.num_layers} blocks, and `shorn "
            f"shorten` leaves the first {first} and the last {last} in place; leave it out"
        )


def _describe(
    config: CompareConfig,
    source: ModelConfig,
    shapes: dict[str, Shape],
    foreign: dict[str, list[tuple[Method, ModelConfig]]],
) -> None:
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
                what = f"{blocks.layers} of {source.num_layers} blocks"
                note = "; no number of blocks comes closer"
                _describe_size(name, method, what, _non_embedding(source, blocks), wanted, note)
        for method, shape in foreign[name]:
            size = shape.num_parameters(embeddings=False)
            _describe_size(name, method, str(method.folder), size, wanted)


def _describe_size(
    target: str, method: Method, what: str, found: int, wanted: int, note: str = ""
) -> None:
    apart = found / wanted - 1
    note = "" if abs(apart) <= CLOSE else note
    logger.info(
        f"{target}, {method.name}: {what}, {found / 1e6:.2f}M "
        f"({100 * apart:+.1f}% of the target's{note})"
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
    pruned = _pruning(row)
    trained = read_result(row.cpt, "cpt.json", _TRAINED)
    trained_as = read_result(row.cpt, "run.json", {"distill.weight?": float})
    steps, tokens = pruned["steps"] + trained["steps"], pruned["tokens"] + trained["tokens"]
    expected = config.steps * config.batch * config.seq_len
    if (steps, tokens) != (config.steps, expected):
        made = [task for task in (row.shear, row.cpt) if task is not None]
        folders = dict.fromkeys(str(task.folder.parent) for task in made)
        raise InputError(
            f"{row.cpt.folder} and what it starts from took {steps} steps and {tokens:,} tokens, "
            f"and every method must take {config.steps} and {expected:,}: delete "
            f"{' and '.join(folders)} and run this again"
        )
    return {
        "target": row.target,
        "method": row.method.name,
        "seed": row.seed,
        "folder": row.method.folder,
        "shape": pruned["shape"],
        "non_embedding_parameters": pruned["non_embedding_parameters"],
        "shear_steps": pruned["steps"],
        "cpt_steps": trained["steps"],
        "tokens": tokens,
        "refit": pruned["refit"],
        "distill_weight": trained_as.get("distill.weight", 0.0),
        "kept_not_alive": pruned["kept_not_alive"],
        "pruned": None if row.pruned is None else _losses(row.pruned),
        "trained": _losses(row.trained),
        "text": _perplexity(row.trained),
        "tasks": _accuracy(row.trained),
    }


def _pruning(row: Row) -> dict[str, Any]:
    """What a row's pruning took and came to."""
    if row.shear is None:
        assert row.shape is not None
        size = row.shape.num_parameters(embeddings=False)
        found: dict[str, Any] = {"steps": 0, "tokens": 0, "refit": None, "kept_not_alive": None}
        return found | {"shape": shape_of(row.shape).to_json(), "non_embedding_parameters": size}
    report = read_result(row.shear, "shear.json", _PRUNED)
    # From scratch, nothing that shearing learned is used.
    fresh = row.method.random
    return {
        "steps": 0 if fresh else report["steps"],
        "tokens": 0 if fresh else report["tokens"],
        "refit": report.get("refit"),
        "kept_not_alive": None if fresh else report["kept_not_alive"],
        "shape": report["target_shape"],
        "non_embedding_parameters": report["parameters"]["target_non_embedding"],
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
