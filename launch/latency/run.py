"""Measures models in turns, prints tables and writes JSON."""

import statistics
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from data.errors import InputError, is_out_of_memory
from data.files import require_distinct, require_writable, write_copy
from data.log import logger
from data.progress import Progress
from data.records import fits, read_json
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from launch.latency.config import LatencyConfig
from launch.latency.generation import Generator, Times
from launch.latency.peak import peak_bytes
from launch.latency.plot import draw
from pruner.timing import Timing, too_busy
from trainer import parallel
from trainer.memory import total_memory
from trainer.models.config import ModelConfig
from trainer.models.hf import check_weights, load_config
from trainer.models.sources import resolve_model, weights_fingerprint

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEADINGS = ("first token (ms)", "per token (ms)", "tokens/s", "speed", "spread", "peak (MB)")
_QUALITY = {"model": str, "weights": str, "overall": {"loss": float}}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model, opened and checked; no weights yet."""

    name: str
    """As the user wrote it."""
    folder: Path
    shape: ModelConfig


@dataclass(slots=True)
class Cell:
    """What was measured of one model at one batch size."""

    batch: int
    times: list[Times]
    """Of the turns that count; empty where memory ran out."""
    peak: int | None = None
    """Bytes; None where it was not measured, or memory ran out."""
    out_of_memory: bool = False

    def to_json(self, new: int) -> dict[str, Any]:
        """Median times, and what follows from them; None where memory ran out."""
        result: dict[str, Any] = {"batch": self.batch, "out_of_memory": self.out_of_memory}
        keys = ("prefill_ms", "decode_ms_per_token", "latency_s", "tokens_per_s", "spread")
        result |= dict.fromkeys(keys)
        result |= {"rounds": len(self.times), "peak_bytes": self.peak}
        if self.times:
            first = statistics.median(times.first for times in self.times)
            total = self.total
            decoding = statistics.median(times.total - times.first for times in self.times)
            result |= {
                "prefill_ms": 1e3 * first,
                "decode_ms_per_token": 1e3 * decoding / (new - 1),
                "latency_s": total.seconds,
                "tokens_per_s": self.batch * new / total.seconds,
                "spread": total.spread,
            }
        return result

    @property
    def total(self) -> Timing:
        """Seconds of whole generations."""
        return Timing(tuple(times.total for times in self.times))


def run(config: LatencyConfig) -> dict[str, Any]:
    """Measures, prints, and returns what --json writes.

    Raises InputError before any weight is read for what cannot work.
    """
    names = {"--json": config.json, "--plot": config.plot, "--quality": config.quality}
    require_distinct(names)
    for option in ("--json", "--plot"):
        require_writable(names[option], option)
    if config.plot is not None and find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'shorn[demo]'")
    device = parallel.init(threads=config.threads).device
    dtype = DTYPES.get(config.precision, parallel.compute_dtype("auto", device))
    candidates = _open(config)
    losses = _losses(config)
    _require_room(candidates, device, dtype)
    cells = [[Cell(batch, []) for batch in config.batch] for _ in candidates]
    if config.memory:
        _measure_peaks(config, candidates, cells, dtype)
    _measure_times(config, candidates, cells, device, dtype)
    result = _result(config, candidates, cells, losses, device, dtype)
    # First, for whoever reads what is printed may not read all of it.
    write_copy(config.json, result)
    _show(config, result)
    if config.plot is not None:
        draw(Path(config.plot), result["models"])
    return result


def _open(config: LatencyConfig) -> list[Candidate]:
    found = []
    needed = config.input_tokens + config.new_tokens
    for name in config.models:
        folder = resolve_model(name, option="MODEL")
        shape = load_config(folder)
        check_weights(folder, shape)
        limit = shape.max_position_embeddings
        if needed > limit:
            left = limit - config.input_tokens
            fix = f"--new-tokens {left} or fewer"
            if left < 2:
                most = max(1, limit - config.new_tokens)
                fix = f"--input-tokens {most} or fewer, and as many --new-tokens as are left"
            raise InputError(
                f"--input-tokens {config.input_tokens} and --new-tokens {config.new_tokens}: "
                f"{name} has {limit} positions; use {fix}"
            )
        found.append(Candidate(name, folder, shape))
    return found


def _losses(config: LatencyConfig) -> list[float] | None:
    """Of the models, in their order. Raises InputError where --quality is of others."""
    if config.quality is None:
        return None
    fix = "give the file that `shorn evaluate --data TOKENS --json FILE` wrote of these models"
    found = read_json(Path(config.quality), fix)
    rows = found.get("models", [found])
    if not fits(rows, [_QUALITY]):
        raise InputError(
            f"--quality {config.quality}: holds no losses on held-out tokens, or some that are not "
            f"finite; {fix}"
        )
    if len(rows) != len(config.models):
        raise InputError(
            f"--quality {config.quality}: holds losses of {len(rows)} models, and "
            f"{len(config.models)} are timed; {fix}, in the same order"
        )
    for name, row in zip(config.models, rows, strict=True):
        if row["weights"] != weights_fingerprint(resolve_model(name, option="MODEL")):
            raise InputError(
                f"--quality {config.quality}: has {row['model']} where {name} is timed, with other "
                f"weights; {fix}, in the same order"
            )
    return [row["overall"]["loss"] for row in rows]


def _require_room(candidates: list[Candidate], device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError where the models cannot take turns."""
    size = sum(one.shape.num_parameters() for one in candidates) * dtype.itemsize
    limit = total_memory(device)
    if size > 0.9 * limit:
        raise InputError(
            f"the models together hold {size / 1e9:.1f} GB, and this device has "
            f"{limit / 1e9:.1f} GB: name fewer at once, or use --precision bf16"
        )


def _measure_peaks(
    config: LatencyConfig, candidates: list[Candidate], cells: list[list[Cell]], dtype: torch.dtype
) -> None:
    total = len(candidates) * len(config.batch)
    with Progress("measure memory", total=total, unit="process", transient=True) as bar:
        for candidate, row in zip(candidates, cells, strict=True):
            for cell in row:
                cell.peak = peak_bytes(
                    candidate.folder,
                    str(dtype).removeprefix("torch."),
                    torch.get_num_threads(),
                    config.input_tokens,
                    config.new_tokens,
                    cell.batch,
                )
                cell.out_of_memory = cell.peak is None
                bar.update(1)


def _measure_times(
    config: LatencyConfig,
    candidates: list[Candidate],
    cells: list[list[Cell]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Models in turns, one batch size after the other."""
    generators = [Generator(one.folder, device, dtype) for one in candidates]
    turns = config.warm_up + config.rounds
    total = turns * len(candidates) * len(config.batch)
    with Progress("generate", total=total, unit="turn", transient=True) as bar:
        for place in range(len(config.batch)):
            for turn in range(turns):
                for generator, row in zip(generators, cells, strict=True):
                    _take_turn(config, generator, row[place], counts=turn >= config.warm_up)
                    bar.update(1)


def _take_turn(config: LatencyConfig, generator: Generator, cell: Cell, *, counts: bool) -> None:
    if cell.out_of_memory:
        return
    try:
        ids = generator.prompts(cell.batch, config.input_tokens)
        times = generator.generate(ids, config.new_tokens)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        cell.out_of_memory, cell.times = True, []
        if generator.device.type == "cuda":
            torch.cuda.empty_cache()
        return
    if counts:
        cell.times.append(times)


def _result(
    config: LatencyConfig,
    candidates: list[Candidate],
    cells: list[list[Cell]],
    losses: list[float] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    reasons = []
    for place, batch in enumerate(config.batch):
        names = [f"{one.name} (model {number})" for number, one in enumerate(candidates, 1)]
        timed = [
            (name, row[place].total, one.shape)
            for name, row, one in zip(names, cells, candidates, strict=True)
            if row[place].times
        ]
        timings = {name: timing for name, timing, _ in timed}
        shapes = {name: shape.key for name, _, shape in timed}
        busy = too_busy(timings, shapes)
        reasons += [] if busy is None else [f"batch {batch}: {busy}"]
    models = []
    for number, (one, row) in enumerate(zip(candidates, cells, strict=True)):
        entry: dict[str, Any] = {
            "model": one.name,
            "parameters": one.shape.num_parameters(),
            "loss": None if losses is None else losses[number],
            "batches": [cell.to_json(config.new_tokens) for cell in row],
        }
        models.append(entry)
    return {
        "engine": "transformers",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "input_tokens": config.input_tokens,
        "new_tokens": config.new_tokens,
        "models": models,
        "busy": "; ".join(reasons) or None,
    }


@passing_over_what_is_not_shown()
def _show(config: LatencyConfig, result: dict[str, Any]) -> None:
    """One table for each batch size, a row for each model."""
    for place, batch in enumerate(config.batch):
        many = f"batch {batch}: {config.input_tokens} tokens in, {config.new_tokens} new"
        table = Table(title=f"{many}, {result['precision']}, {result['device']}")
        table.add_column("model", overflow="fold")
        for heading in (*HEADINGS, *(["loss"] if config.quality else [])):
            table.add_column(heading, justify="right")
        first = result["models"][0]["batches"][place]
        for entry in result["models"]:
            cell = entry["batches"][place]
            table.add_row(entry["model"], *_cells(cell, first), *_loss(entry))
        print_table(table)
    if result["busy"] is not None:
        logger.warning(f"{result['busy']}; measure again on a quiet machine")


def _cells(cell: dict[str, Any], first: dict[str, Any]) -> list[str]:
    peak = "-" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e6:,.0f}"
    if cell["out_of_memory"]:
        return ["OOM", "", "", "", "", peak]
    speed = "-"
    if first["latency_s"] is not None:
        speed = f"{first['latency_s'] / cell['latency_s']:.2f}x"
    return [
        f"{cell['prefill_ms']:.4g}",
        f"{cell['decode_ms_per_token']:.4g}",
        f"{cell['tokens_per_s']:,.1f}",
        speed,
        f"{cell['spread']:.0%}",
        peak,
    ]


def _loss(entry: dict[str, Any]) -> list[str]:
    return [] if entry["loss"] is None else [f"{entry['loss']:.4f}"]
