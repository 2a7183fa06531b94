"""Pictures of the report about training: losses, domain weights, learning rate, speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from launch.report.figures import BLUE, COLOURS, INK, ORANGE, WIDE, Group, Picture, line
from launch.report.run_folder import Run, mean_loss

SMOOTHING = 50
"""A smoothed curve averages over this fraction of its points, 1 / SMOOTHING."""
BASELINE = 2
"""Index in COLOURS of runs from random weights that are shown beside another."""


@dataclass(frozen=True, slots=True)
class Point:
    """One line of metrics.jsonl, placed on the axis of tokens of all runs."""

    tokens: int
    """Tokens trained by this run and those before it."""
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Curve:
    """The points of one run, at least one."""

    run: Run
    points: list[Point]
    baseline: bool
    """Whether it started from random weights, beside the run that is shown before it."""

    @property
    def tokens(self) -> list[int]:
        return [point.tokens for point in self.points]

    def values(self, key: str) -> list[float]:
        """A number of every record; NaN where it has none."""
        return [point.record.get(key, np.nan) for point in self.points]

    def held_out(self) -> tuple[list[int], list[dict[str, Any]]]:
        """Tokens and {domain: {loss, tokens}} of the records with held-out losses."""
        measured = [point for point in self.points if point.record.get("held_out")]
        return [p.tokens for p in measured], [p.record["held_out"] for p in measured]


def training_groups(runs: Sequence[Run]) -> list[Group]:
    """Everything that can be drawn from the metrics of runs that followed each other.

    A run from random weights follows none: it is drawn in the picture of losses only, beside the
    run before it.
    """
    curves = joined(runs)
    if not curves:
        return []
    chain = [curve for curve in curves if not curve.baseline]
    groups = [losses(curves), domains(chain), pace(chain)]
    return [group for group in groups if group.pictures]


def joined(runs: Sequence[Run]) -> list[Curve]:
    """The curve of each run with records; tokens count on from the end of the run before."""
    start, end = 0, 0
    curves: list[Curve] = []
    for run in runs:
        baseline = bool(curves) and run.command == "cpt" and run.identity.get("init") == "random"
        start = start if baseline else end
        points = [Point(start + r["tokens"], r) for r in run.metrics if "tokens" in r]
        if points:
            curves.append(Curve(run, points, baseline))
            end = end if baseline else points[-1].tokens
    return curves


def _caption(curves: Sequence[Curve], shearing: str, training: str) -> str:
    """The caption for curves with shearing among them or without, and what lines between mean."""
    text = shearing if any(curve.run.command == "shear" for curve in curves) else training
    if sum(not curve.baseline for curve in curves) > 1:
        text += " A vertical line marks where one run ends and the next begins."
    return text


def losses(curves: Sequence[Curve]) -> Group:
    """Training loss and mean held-out loss over tokens."""
    source = next((mean_loss(h) for curve in curves if (h := source_held_out(curve.run))), None)
    means = [mean_loss(row) for c in curves if not c.baseline for row in c.held_out()[1]]

    def paint(axis: Any) -> None:
        for curve in curves:
            colour = COLOURS[BASELINE] if curve.baseline else BLUE
            x, y = curve.tokens, curve.values("loss")
            smooth = smoothed(y)
            if smooth is not None:
                axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
            line(axis, x, y if smooth is None else smooth, color=colour)
            x, rows = curve.held_out()
            held = colour if curve.baseline else ORANGE
            axis.plot(x, [mean_loss(row) for row in rows], "o-", color=held, ms=4.5, lw=1)
        if source is not None:
            axis.axhline(source, color=INK, linestyle=":", linewidth=1.2)
        _label(axis, curves, "loss (nats per token)")

    last = next(c.points[-1] for c in reversed(curves) if not c.baseline)
    alt = f"Training loss, {last.record.get('loss', np.nan):.3f} at {last.tokens:,} tokens"
    if means:
        alt += f"; held-out loss {means[0]:.3f} first, {means[-1]:.3f} last"
    long = any(len(curve.points) >= 2 * SMOOTHING for curve in curves)
    legend = [("c0", "training text" + (", smoothed" if long else ""))]
    legend += [("held", "held-out text")] if means else []
    legend += [
        (f"c{BASELINE}", f"{c.run.folder.name}: from random weights, both texts")
        for c in curves
        if c.baseline
    ]
    legend += [("source", "source model, held-out text")] if source is not None else []
    caption = _caption(
        curves,
        "Loss over training tokens. While units are being removed the loss rises; it should fall "
        "again once the shape is reached, and held-out text should follow training text.",
        "Loss over training tokens; held-out text should follow training text down.",
    )
    return Group("Loss", caption, [Picture("all domains", alt, paint, WIDE)], legend, wide=True)


def source_held_out(run: Run) -> dict[str, dict[str, float]]:
    """Held-out losses of the source model by domain, where the run's report has them."""
    measured: dict[str, dict[str, float]] = (run.report or {}).get("source_held_out") or {}
    return measured


def smoothed(values: Sequence[float]) -> np.ndarray | None:
    """Means over a centred window, shorter at both ends; None for curves too short to need it.

    A value that is not a number makes its window so.
    """
    if len(values) < 2 * SMOOTHING:
        return None
    window = np.ones(len(values) // SMOOTHING // 2 * 2 + 3)
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def domains(curves: Sequence[Curve]) -> Group:
    """Held-out loss and weight of each domain over tokens."""
    records = [point.record for curve in curves for point in curve.points]
    keys = ("domain_weights", "domain_loss", "held_out")
    names = sorted({name for record in records for key in keys for name in record.get(key) or {}})
    before = next((held for c in curves if (held := source_held_out(c.run))), {})

    def paint_held_out(axis: Any) -> None:
        for index, name in enumerate(names):
            style = _domain_style(index)
            for curve in curves:
                x, rows = curve.held_out()
                y = [row.get(name, {}).get("loss", np.nan) for row in rows]
                axis.plot(x, y, marker="o", markersize=4, **style)
            if name in before:
                axis.axhline(before[name]["loss"], **(style | {"linestyle": ":", "linewidth": 1}))
        _label(axis, curves, "held-out loss")

    def paint_weights(axis: Any) -> None:
        for index, name in enumerate(names):
            for curve in curves:
                weights = [point.record.get("domain_weights") or {} for point in curve.points]
                y = [weight.get(name, np.nan) for weight in weights]
                line(axis, curve.tokens, y, drawstyle="steps-post", **_domain_style(index))
        _label(axis, curves, "domain weight", ylim=(0, None))

    pictures = []
    if any(record.get("held_out") for record in records):
        alt = f"Held-out loss of {len(names)} domains over tokens"
        pictures.append(Picture("held-out loss", alt, paint_held_out, WIDE))
    if any(record.get("domain_weights") for record in records):
        last = sorted((records[-1].get("domain_weights") or {}).items())
        alt = "Domain weights over tokens; last: "
        alt += ", ".join(f"{name} {weight:.3f}" for name, weight in last)
        pictures.append(Picture("weight in the training data", alt, paint_weights, WIDE))
    text = (
        "A dynamic mixture gives weight to domains that are further above their reference loss; "
        "weights that lie still from the start belong to a fixed one."
        + (" Dotted: the source model's held-out loss." if before and pictures else "")
    )
    legend = [
        (f"c{index % len(COLOURS)}" + (" dashed" if index >= len(COLOURS) else ""), name)
        for index, name in enumerate(names)
    ]
    return Group("Domains", _caption(curves, text, text), pictures, legend, wide=True)


def _domain_style(index: int) -> dict[str, Any]:
    style = ("-", "--", "-.")[index // len(COLOURS) % 3]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style, "linewidth": 1.4}


def pace(curves: Sequence[Curve]) -> Group:
    """Learning rate, speed and gradient norm over tokens."""
    pictures = []
    for key, title, unit in (
        ("lr", "learning rate", "learning rate"),
        ("tokens_per_second", "speed", "tokens/s"),
        ("grad_norm", "gradient norm before clipping", "norm"),
    ):
        values = [p.record[key] for curve in curves for p in curve.points if key in p.record]
        if values:
            paint = partial(_paint_pace, curves=curves, key=key, unit=unit)
            alt = f"{title.capitalize()} over tokens, {values[0]:.3g} first, {values[-1]:.3g} last"
            pictures.append(Picture(title, alt, paint))
    rest = (
        "; steps that are much slower than their neighbours waited for something. A gradient "
        "norm that climbs announces divergence: lower the learning rate."
    )
    level = "Shearing usually gets faster as it removes units; otherwise speed should be level"
    caption = _caption(curves, level + rest, "Speed should be level" + rest)
    return Group("Learning rate and speed", caption, pictures)


def _paint_pace(axis: Any, curves: Sequence[Curve], key: str, unit: str) -> None:
    for curve in curves:
        line(axis, curve.tokens, curve.values(key))
    _label(axis, curves, unit, ylim=(0, None))


def _label(axis: Any, curves: Sequence[Curve], ylabel: str, **limits: Any) -> None:
    """Names the axes, of which x is in tokens, and draws a line between runs."""
    from matplotlib.ticker import EngFormatter

    axis.set(xlabel="training tokens", ylabel=ylabel, **limits)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    ends = [curve.tokens[-1] for curve in curves if not curve.baseline]
    for end in ends[:-1]:
        axis.axvline(end, color=INK, linewidth=0.8, alpha=0.6)
