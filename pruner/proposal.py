"""From a budget to a shape, with what explains it: the table a run prints and OUTPUT/target.json.

A run resolves its budget once. A resumed run takes the shape from its output folder, because a
speedup measured again might come to another one.
"""

import math
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.errors import InputError
from data.log import logger
from data.records import fits, read_json
from data.tables import print_table
from pruner.budget import (
    BLOCK_PARAMETERS,
    SHARE,
    SPEEDUP,
    Budget,
    Cost,
    Proposal,
    alternatives,
    propose,
    smallest,
)
from pruner.latency import POSITIONS, Timer, decode_timer, measure_latency
from pruner.shapes import Shape, config_of, parse_target, shape_of, validate
from pruner.timing import too_busy
from trainer.checkpoint_files import latest_step
from trainer.memory import total_memory
from trainer.models.config import ModelConfig
from trainer.parallel import DistributedContext

TARGET_FILE = "target.json"
OPEN_FILE = "shapes/proposal.json"
"""What a search begins with, beside what it measures."""
ALTERNATIVES = "alternatives"
"""Key of the shapes to search among, and what each costs, in a proposal that is still open."""
FIT_TOLERANCE = 0.15
"""Largest relative error of fitted times that goes without a warning: on a quiet machine it is a
few per cent."""
SHORTFALL = 0.05
"""Part of the speedup that may be missing in the measured one without a warning."""


def resolve_together(
    budget: Budget,
    source: ModelConfig,
    output: Path,
    context: DistributedContext,
    dtype: torch.dtype,
    *,
    search: bool = False,
) -> dict[str, Any]:
    """`resolve` on rank 0, or what `output` recorded of it when its run began; on every rank.

    All ranks take part. Raises InputError on every rank.
    """
    record, problem = None, None
    if context.is_main:
        trained = latest_step(output / "checkpoints") is not None
        try:
            if trained or (output / "shear.json").exists():
                record = recorded(output, budget, source)
            if record is not None:
                _require_same_way(record, budget, search, output)
                logger.info(f"target {budget.text} is {record['shape']} ({output / TARGET_FILE})")
            elif search:
                record = recorded(output, budget, source, OPEN_FILE)
                record = record if record is not None and _usable(record, budget) else None
            if record is None:
                record = resolve(budget, source, context.device, dtype, search=search)
        except InputError as error:
            problem = str(error)
    context.raise_first(problem)
    shared: dict[str, Any] = context.broadcast(record)
    return shared


def _usable(record: dict[str, Any], budget: Budget) -> bool:
    """Whether a search that was interrupted may go on from its `record`: it was made in the same
    way, on a machine that was quiet."""
    latency = record.get("latency")
    quiet = not (isinstance(latency, dict) and latency.get("busy"))
    return record.get("align") == budget.align and quiet and ALTERNATIVES in record


def _require_same_way(record: dict[str, Any], budget: Budget, search: bool, output: Path) -> None:
    """Raises InputError where a run's shape was proposed in another way than is asked for now."""
    words = {True: "search", False: "rule"}
    searched = words["search" in record]
    if searched != words[search]:
        raise InputError(
            f"{output} holds a run of another configuration: --propose was {searched}, now "
            f"{words[search]}. Repeat the old value to resume it, or choose another --output to "
            "start a new run"
        )
    if record.get("align") != budget.align:
        then, now = (value or "not given" for value in (record.get("align"), budget.align))
        raise InputError(
            f"{output} holds a run of another configuration: --align was {then}, now {now}. "
            "Repeat the old value to resume it, or choose another --output to start a new run"
        )


def recorded(
    output: Path, budget: Budget, source: ModelConfig, file: str = TARGET_FILE
) -> dict[str, Any] | None:
    """What `resolve` returned for the same budget and source when the run in `output` began, or its
    search (OPEN_FILE); None where nothing is recorded of them. Raises InputError when the record
    cannot be read."""
    path = output / file
    if not path.exists():
        return None
    record: dict[str, Any] = read_json(
        path,
        f"name the shape in place of the budget: --target with the `target` of {output}/run.json",
        keys={"budget": str, "source": str, "shape": str},
    )
    same = record["budget"] == budget.text
    return record if same and record["source"] == shape_of(source).describe() else None


def measured_seconds(output: Path) -> dict[str, float]:
    """Seconds per decoded token of "source" and "target" that were measured for the budget of the
    run in `output`; none where none were, or a busy machine measured them."""
    try:
        latency = read_json(output / TARGET_FILE, "").get("latency")
    except InputError:
        return {}
    known = {"measured": {"source": float, "target": float}}
    if not fits(latency, known) or latency.get("busy"):
        return {}
    measured: dict[str, float] = latency["measured"]
    return measured


def resolve(
    budget: Budget,
    source: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    search: bool = False,
) -> dict[str, Any]:
    """The shape that `budget` comes to, printed with its reasons; what a run keeps of it.

    A speedup is measured on `device` in `dtype`, which takes seconds, minutes for large models on
    a CPU. The result holds "budget" and "shape" in the notation of --target, "source", both
    numbers of "parameters", the share "used" of the limit, and "latency" for a speedup; for a
    `search` also the ALTERNATIVES that it compares.

    Raises InputError when no valid shape meets the budget, naming the nearest that one does.
    """
    if budget.kind == SPEEDUP:
        timer = decode_timer(device, dtype)
        proposal, cost, latency = _for_speedup(budget, source, timer, device, dtype)
    else:
        (proposal, cost), latency = _for_parameters(budget, source), None
    target = config_of(proposal.shape, source)
    validate(proposal.shape, shape_of(source))
    record = {
        "budget": budget.text,
        "source": shape_of(source).describe(),
        "shape": proposal.shape.describe(),
        "parameters": {"source": source.num_parameters(), "target": target.num_parameters()},
        "non_embedding_parameters": {
            "source": source.num_parameters(embeddings=False),
            "target": target.num_parameters(embeddings=False),
        },
        "used": proposal.cost / proposal.limit,
        "latency": latency,
        "align": budget.align,
    }
    if search:
        others = alternatives(source, cost, proposal.limit, budget.fixed, budget.align)
        record[ALTERNATIVES] = {shape.describe(): spent for shape, spent in others}
        record["limit"] = proposal.limit
    _explain(record, budget, shape_of(source), proposal.shape)
    return record


def settled(record: dict[str, Any], found: dict[str, Any], source: ModelConfig) -> dict[str, Any]:
    """An open proposal with the shape that a search has found (pruner.shape_search)."""
    closed = {name: value for name, value in record.items() if name != ALTERNATIVES}
    spent = record[ALTERNATIVES][found["shape"]]
    target = config_of(parse_target(found["shape"], shape_of(source)), source)
    closed |= {"shape": found["shape"], "search": found["compared"]}
    closed["used"] = spent / record["limit"]
    counts = {"parameters": True, "non_embedding_parameters": False}
    for name, embeddings in counts.items():
        closed[name] = record[name] | {"target": target.num_parameters(embeddings=embeddings)}
    if record["latency"] and found["shape"] != record["shape"]:
        # What was measured is the rule's shape.
        predicted = record["latency"]["predicted"] | {"target": spent}
        closed["latency"] = record["latency"] | {"predicted": predicted, "measured": None}
        logger.info(f"predicted to decode {predicted['source'] / spent:.2f}x as fast as the source")
    return closed


def _for_parameters(budget: Budget, source: ModelConfig) -> tuple[Proposal, Cost]:
    def cost(config: ModelConfig) -> float:
        return float(config.num_parameters(embeddings=budget.kind != BLOCK_PARAMETERS))

    most = cost(source)
    if budget.amount >= most:
        raise InputError(
            f"target {budget.kind}={budget.amount:,.0f} is not below the source's {most:,.0f}: "
            f"pruning only removes units, use for example {budget.kind}={most / 2:.0f}"
        )
    proposal = propose(source, cost, budget.amount, budget.fixed, budget.align)
    if proposal is None:
        shape, least = smallest(source, cost, budget.fixed, budget.align)
        raise InputError(
            f"target {budget.kind}={budget.amount:,.0f} is less than the smallest shape that a "
            f"budget can give{_beside(budget)}, {shape.describe()} with {least:,.0f}: "
            f"use {budget.kind}={least:.0f} or more, or give the sizes themselves"
        )
    return proposal, cost


def _for_speedup(
    budget: Budget, source: ModelConfig, timer: Timer, device: torch.device, dtype: torch.dtype
) -> tuple[Proposal, Cost, dict[str, Any]]:
    threads = f", threads {torch.get_num_threads()}" if device.type == "cpu" else ""
    setting = f"{device.type}, {str(dtype).removeprefix('torch.')}, batch 1, {POSITIONS} positions"
    logger.info(f"measuring how decoding time depends on the shape ({setting}{threads})")
    model, timings = measure_latency(source, timer, dtype.itemsize)
    before = model.predict(source)
    limit = before / budget.amount
    proposal = propose(source, model.predict, limit, budget.fixed, budget.align)
    if proposal is None:
        shape, least = smallest(source, model.predict, budget.fixed, budget.align)
        most = math.floor(before / least * 100) / 100
        # Measured again, it may come out a little slower.
        safe = math.floor(before / least / (1 + FIT_TOLERANCE) * 100) / 100
        fix = f"use at most speedup={safe:.2f}" if safe > 1 else "give the sizes themselves"
        raise InputError(
            f"target speedup={budget.amount:g} is out of reach on this device: the fastest shape "
            f"that a budget can give{_beside(budget)}, {shape.describe()}, decodes {most:.2f} "
            f"times as fast as the source; {fix}"
        )
    pair = {"source": source, "target": config_of(proposal.shape, source)}
    latency: dict[str, Any] = {
        "setting": setting + threads,
        "model": model.as_dict(),
        "predicted": {"source": before, "target": proposal.cost},
        "measured": None,
    }
    size = sum(config.num_parameters() for config in pair.values()) * dtype.itemsize
    if size <= total_memory(device) // 2:
        found = dict(zip(pair, timer(list(pair.values())), strict=True))
        latency["measured"] = {name: timing.seconds for name, timing in found.items()}
        latency["rounds"] = {name: timing.to_json() for name, timing in found.items()}
        timings |= found
    # No two of these have one shape.
    latency["busy"] = too_busy(timings, {name: name for name in timings})
    return proposal, model.predict, latency


def _sizes(budget: Budget) -> str:
    """The sizes given beside the budget, as in --target."""
    return ",".join(f"{key}={size}" for key, size in budget.fixed.items())


def _beside(budget: Budget) -> str:
    return f" with {_sizes(budget)}" if budget.fixed else ""


def _explain(record: dict[str, Any], budget: Budget, source: Shape, target: Shape) -> None:
    """Prints what was chosen, why, and how to ask for the same shape by name."""
    table = Table("", title=f"--target {budget.text}", title_justify="left")
    for title in ("source", "target", "kept"):
        table.add_column(title, justify="right")
    rows = {
        "layers": (source.layers, target.layers),
        "hidden": (source.hidden, target.hidden),
        "heads": (source.heads, target.heads),
        "KV heads": (source.kv_heads, target.kv_heads),
        "FFN channels": (source.ffn, target.ffn),
        "parameters": tuple(record["parameters"].values()),
        "  without embeddings": tuple(record["non_embedding_parameters"].values()),
    }
    for name, (before, after) in rows.items():
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before:.0%}")
    latency = record["latency"]
    for kind in ("predicted", "measured") if latency else ():
        if latency[kind]:
            before, after = latency[kind].values()
            row = (
                f"{1e3 * before:.4g} ms",
                f"{1e3 * after:.4g} ms",
                f"{before / after:.2f}x faster",
            )
            table.add_row(f"{kind} time per token", *row)
    rounds = (latency or {}).get("rounds")
    if rounds:
        spread = (f"{rounds[name]['spread']:.0%} of {rounds[name]['rounds']}" for name in rounds)
        table.add_row("  spread of the rounds", *spread, "")
    print_table(table)
    limit = "time" if latency else "budget"
    among = f"shapes that use at least {SHARE:.0%} of the {limit}"
    if record["used"] < SHARE:
        among = f"largest shapes within the {limit}, for the steps between shapes are coarse"
    given = f" and have {_sizes(budget)}" if budget.fixed else ""
    logger.info(
        f"why: it uses {record['used']:.1%} of the {limit} and is, among the {among}{given},"
    )
    logger.info("  the one nearest to the source and its proportions")
    if latency:
        _explain_times(latency, budget)
    logger.info(f"the same shape by name: --target {record['shape']}")


def _explain_times(latency: dict[str, Any], budget: Budget) -> None:
    """Says how the times came about, and warns of those that cannot be relied on."""
    error = latency["model"]["error"]
    logger.info(
        f"predicted from times measured here ({latency['setting']}), fitted within {error:.0%}"
    )
    again = "run this again on a quiet machine, or name the sizes yourself"
    if latency["busy"]:
        logger.warning(f"{latency['busy']}; the shape rests on these times: {again}")
    elif error > FIT_TOLERANCE:
        logger.warning(
            f"the predicted times miss those measured by up to {error:.0%} (limit "
            f"{FIT_TOLERANCE:.0%}), so the shape may be wrong by as much: {again}"
        )
    measured = latency["measured"]
    if not measured:
        logger.info("not measured: both models together need more than half of the device's memory")
    elif measured["source"] / measured["target"] < (1 - SHORTFALL) * budget.amount:
        logger.warning(
            f"measured, the target decodes {measured['source'] / measured['target']:.2f}x as fast "
            f"as the source, not {budget.amount:g}x: ask for a larger speedup, or {again}"
        )
