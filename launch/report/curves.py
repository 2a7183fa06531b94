"""Pictures of the report page about training: losses, domain weights, learning rate, speed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from launch.demo.plots import mean_loss
from launch.report.figures import BLUE, COLOURS, INK, ORANGE, WIDE, Group, draw, line
from launch.report.run_folder import Run

SMOOTHING = 50
"""A smoothed curve averages over this fraction of its points, 1 / SMOOTHING."""


@dataclass(frozen=True, slots=True)
class Point:
    """One line of metrics.jsonl, placed on the axis of tokens of all runs."""

    tokens: int
    """Tokens trained by this run and those before it."""
    record: dict[str, Any]


def training_groups(runs: Sequence[Run]) -> list[Group]:
    """Everything that can be drawn from the metrics of runs that followed each other."""
    points = joined(runs)
    if not any(points):
        return []
    names = domain_names(points)
    groups = [losses(runs, points), domains(runs, points, names), pace(runs, points)]
    if any(points[:-1]):
        line_between = " A vertical line marks where one run ends and the next begins."
        groups = [replace(group, caption=group.caption + line_between) for group in groups]
    return [group for group in groups if group.pictures]


def _shears(runs: Sequence[Run], points: Sequence[Sequence[Point]]) -> bool:
    """Whether any of the points are of shearing."""
    return any(run.command == "shear" for run, drawn in zip(runs, points, strict=True) if drawn)


def joined(runs: Sequence[Run]) -> list[list[Point]]:
    """The records of each run; tokens count on from the end of the run before."""
    start, result = 0, []
    for run in runs:
        result.append([Point(start + r["tokens"], r) for r in run.metrics if "tokens" in r])
        if result[-1]:
            start = result[-1][-1].tokens
    return result


def domain_names(points: Sequence[Sequence[Point]]) -> list[str]:
    """Every domain of any record, sorted."""
    keys = ("domain_weights", "domain_loss", "held_out")
    return sorted({name for p in _flat(points) for key in keys for name in p.record.get(key) or {}})


def _flat(points: Sequence[Sequence[Point]]) -> list[Point]:
    return [point for run in points for point in run]


def losses(runs: Sequence[Run], points: Sequence[Sequence[Point]]) -> Group:
    """Training loss and mean held-out loss over tokens."""
    source = next((mean_loss(held) for run in runs if (held := source_held_out(run))), None)
    held_out = [_held_out_means(run) for run in points]

    def paint(axis: Any) -> None:
        for run, means in zip(points, held_out, strict=True):
            x, y = [p.tokens for p in run], [p.record.get("loss", np.nan) for p in run]
            smooth = smoothed(y)
            if smooth is not None:
                axis.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.7)
            line(axis, x, y if smooth is None else smooth)
            axis.plot(*means, "o-", color=ORANGE, markersize=4.5, linewidth=1)
        if source is not None:
            axis.axhline(source, color=INK, linestyle=":", linewidth=1.2)
        axis.set(ylabel="loss (nats per token)")
        _tokens_axis(axis, points)

    means = [value for _, values in held_out for value in values]
    last = next(run[-1] for run in reversed(points) if run)
    alt = f"Training loss, {last.record.get('loss', float('nan')):.3f} at {last.tokens:,} tokens"
    if means:
        alt += f"; held-out loss {means[0]:.3f} first, {means[-1]:.3f} last"
    legend = [("c0", "training text" + (", smoothed" if _is_long(points) else ""))]
    legend += [("held", "held-out text")] if means else []
    legend += [("source", "source model, held-out text")] if source is not None else []
    caption = (
        "Loss over training tokens. While units are being removed the loss rises; it should fall "
        "again once the shape is reached, and held-out text should follow training text."
        if _shears(runs, points)
        else "Loss over training tokens; held-out text should follow training text down."
    )
    picture = draw(paint, title="all domains", alt=alt, size=WIDE)
    return Group("Loss", caption, [picture], legend, wide=True)


def source_held_out(run: Run) -> dict[str, dict[str, float]]:
    """Held-out losses of the source model by domain, where the run's report has them."""
    measured: dict[str, dict[str, float]] = (run.report or {}).get("source_held_out") or {}
    return measured


def _held_out_means(run: Sequence[Point]) -> tuple[list[int], list[float]]:
    measured = [p for p in run if p.record.get("held_out")]
    return [p.tokens for p in measured], [mean_loss(p.record["held_out"]) for p in measured]


def _is_long(points: Sequence[Sequence[Point]]) -> bool:
    return any(len(run) >= 2 * SMOOTHING for run in points)


def smoothed(values: Sequence[float]) -> np.ndarray | None:
    """Means over a centred window, shorter at both ends; None for curves too short to need it.

    A value that is not a number makes its window so.
    """
    if len(values) < 2 * SMOOTHING:
        return None
    half = len(values) // SMOOTHING // 2 + 1
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    gaps = np.concatenate([[0], np.cumsum(np.isnan(np.array(values, float)))])
    low = np.clip(np.arange(len(values)) - half, 0, None)
    high = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    means: np.ndarray = (sums[high] - sums[low]) / (high - low)
    return np.where(gaps[high] > gaps[low], np.nan, means)


def domains(runs: Sequence[Run], points: Sequence[Sequence[Point]], names: Sequence[str]) -> Group:
    """Held-out loss and weight of each domain over tokens."""
    before = next((held for run in runs if (held := source_held_out(run))), {})

    def paint_held_out(axis: Any) -> None:
        for index, name in enumerate(names):
            style = _domain_style(index)
            for run in points:
                measured = [p for p in run if name in (p.record.get("held_out") or {})]
                losses = [p.record["held_out"][name]["loss"] for p in measured]
                x = [p.tokens for p in measured]
                axis.plot(x, losses, marker="o", markersize=4, **style)
            if name in before:
                axis.axhline(before[name]["loss"], **(style | {"linestyle": ":", "linewidth": 1}))
        axis.set(ylabel="held-out loss")
        _tokens_axis(axis, points)

    def paint_weights(axis: Any) -> None:
        for index, name in enumerate(names):
            for run in points:
                y = [(p.record.get("domain_weights") or {}).get(name, np.nan) for p in run]
                x = [p.tokens for p in run]
                line(axis, x, y, drawstyle="steps-post", **_domain_style(index))
        axis.set(ylabel="domain weight", ylim=(0, None))
        _tokens_axis(axis, points)

    last = next(run[-1] for run in reversed(points) if run).record
    pictures = []
    if any(p.record.get("held_out") for p in _flat(points)):
        alt = f"Held-out loss of {len(names)} domains over tokens"
        pictures.append(draw(paint_held_out, title="held-out loss", alt=alt, size=WIDE))
    if any(p.record.get("domain_weights") for p in _flat(points)):
        weights = last.get("domain_weights") or {}
        alt = "Domain weights over tokens; last: " + ", ".join(
            f"{name} {weight:.3f}" for name, weight in sorted(weights.items())
        )
        title = "weight in the training data"
        pictures.append(draw(paint_weights, title=title, alt=alt, size=WIDE))
    caption = (
        "A dynamic mixture gives weight to domains that are further above their reference loss; "
        "weights that lie still from the start belong to a fixed one."
        + (" Dotted: the source model's held-out loss." if before and pictures else "")
    )
    legend = [
        (f"c{index % len(COLOURS)}" + (" dashed" if index >= len(COLOURS) else ""), name)
        for index, name in enumerate(names)
    ]
    return Group("Domains", caption, pictures, legend, wide=True)


def _domain_style(index: int) -> dict[str, Any]:
    style = ("-", "--", "-.")[index // len(COLOURS) % 3]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style, "linewidth": 1.4}


def pace(runs: Sequence[Run], points: Sequence[Sequence[Point]]) -> Group:
    """Learning rate, speed and gradient norm over tokens."""
    pictures = []
    for key, title, unit in (
        ("lr", "learning rate", "learning rate"),
        ("tokens_per_second", "speed", "tokens/s"),
        ("grad_norm", "gradient norm before clipping", "norm"),
    ):
        values = [p.record[key] for p in _flat(points) if key in p.record]
        if values:
            paint = _painter(points, key, unit)
            alt = f"{title.capitalize()} over tokens, {values[0]:.3g} first, {values[-1]:.3g} last"
            pictures.append(draw(paint, title=title, alt=alt))
    level = "Shearing usually gets faster as it removes units; otherwise speed should be level"
    caption = (level if _shears(runs, points) else "Speed should be level") + (
        "; steps that are much slower than their neighbours waited for something. A gradient "
        "norm that climbs announces divergence: lower the learning rate."
    )
    return Group("Learning rate and speed", caption, pictures)


def _painter(points: Sequence[Sequence[Point]], key: str, unit: str) -> Callable[[Any], None]:
    def paint(axis: Any) -> None:
        for run in points:
            line(axis, [p.tokens for p in run], [p.record.get(key, np.nan) for p in run])
        axis.set(ylabel=unit, ylim=(0, None))
        _tokens_axis(axis, points)

    return paint


def _tokens_axis(axis: Any, points: Sequence[Sequence[Point]]) -> None:
    """Labels the axis of tokens and draws a line between runs."""
    from matplotlib.ticker import EngFormatter

    axis.set(xlabel="training tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for run in points[:-1]:
        if run:
            axis.axvline(run[-1].tokens, color=INK, linewidth=0.8, alpha=0.6)
