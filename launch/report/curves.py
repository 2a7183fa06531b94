"""Pictures of the report about training: losses, domain weights, learning rate, speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.figures import BLUE, COLOURS, INK, ORANGE, WIDE, Group, Picture, line
from launch.report.lineage import Line, Text, text_of
from launch.report.run_folder import Run, mean_loss
from pruner.shapes import Shape, shape_of

SMOOTHING = 50
"""A smoothed curve averages over this fraction of its points, 1 / SMOOTHING."""
FIRST_COLOUR = 2
"""Index in COLOURS of the second of several lines of runs; the first has colours of its own."""


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
    line: int
    """Which of the lines of runs it belongs to; the first is 0."""
    baseline: bool
    """Whether it belongs to a line from random weights, beside others."""

    @property
    def tokens(self) -> list[int]:
        return [point.tokens for point in self.points]

    @property
    def colour(self) -> str:
        """Of what belongs to the line."""
        return line_colour(self.line)

    def values(self, key: str) -> list[float]:
        """A number of every record; NaN where it has none."""
        return [point.record.get(key, np.nan) for point in self.points]

    def held_out(self, text: Text | None = None) -> tuple[list[int], list[dict[str, Any]]]:
        """Tokens and {domain: {loss, tokens}} of the records with held-out losses; with `text` only
        of those that were measured on it."""
        measured = [point for point in self.points if point.record.get("held_out")]
        if text is not None:
            measured = [p for p in measured if text_of(self.run, p.record["held_out"]) == text]
        return [p.tokens for p in measured], [p.record["held_out"] for p in measured]


def line_colour(index: int) -> str:
    """The colour of the line of this number."""
    if index == 0:
        return BLUE
    return COLOURS[(FIRST_COLOUR + index - 1) % len(COLOURS)]


def training_groups(lines: Sequence[Line]) -> list[Group]:
    """Everything that can be drawn from the metrics of runs.

    Lines from random weights are drawn in the pictures of losses only, beside the others.
    """
    curves = joined(lines)
    if not curves:
        return []
    chains = [curve for curve in curves if not curve.baseline]
    groups = [losses(lines, curves), domains(lines, chains), pace(lines, chains)]
    return [group for group in groups if group.pictures]


def joined(lines: Sequence[Line]) -> list[Curve]:
    """The curve of each run with records. Tokens count on from the end of the run whose model it
    started from; random weights stand beside the first training of a model of their shape."""
    ends: dict[Path, int] = {}
    starts: list[tuple[Shape, int]] = []
    curves: list[Curve] = []
    for index, one in enumerate(lines):
        start = 0 if one.after is None else ends.get(one.after.folder, 0)
        if one.random:
            shape = shape_of(one.runs[0].model)
            start = next((begun for other, begun in starts if other == shape), 0)
        for run in one.runs:
            points = [Point(start + r["tokens"], r) for r in run.metrics if "tokens" in r]
            if run.command != "shear":
                starts.append((shape_of(run.model), start))
            if points:
                curves.append(Curve(run, points, index, one.random and len(lines) > 1))
                start = points[-1].tokens
            ends[run.folder] = start
    return curves


def newest_text(curves: Sequence[Curve]) -> Text | None:
    """What the newest held-out losses of the first line that has any were measured on."""
    newest: dict[int, Text] = {}
    for curve in curves:
        _, rows = curve.held_out()
        if rows:
            newest[curve.line] = text_of(curve.run, rows[-1])
    return newest[min(newest)] if newest else None


def _caption(curves: Sequence[Curve], shearing: str, training: str) -> str:
    """The caption for curves with shearing among them or without, and what lines between mean."""
    text = shearing if any(curve.run.command == "shear" for curve in curves) else training
    if _borders(curves):
        text += " A vertical line marks where one run ends and the next begins."
    return text


def _borders(curves: Sequence[Curve]) -> set[int]:
    """Tokens at which a run ends that another of its line follows."""
    return {a.tokens[-1] for a, b in pairwise(curves) if a.line == b.line}


def losses(lines: Sequence[Line], curves: Sequence[Curve]) -> Group:
    """Training loss and mean held-out loss over tokens, and the divergence from the teacher."""
    text = newest_text(curves)
    source = _source(curves, text)
    several = len(lines) > 1

    def paint(axis: Any) -> None:
        for curve in curves:
            colour = curve.colour
            x, y = curve.tokens, curve.values("loss")
            smooth = smoothed(y)
            if smooth is not None:
                axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
            line(axis, x, y if smooth is None else smooth, color=colour)
            held = ORANGE if curve.line == 0 else colour
            for same, fill in ((True, held), (False, "white")):
                _paint_held_out(axis, curve, text, same, held, fill)
        if source is not None:
            axis.axhline(source, color=INK, linestyle=":", linewidth=1.2)
        _label(axis, curves, "loss (nats per token)")

    first = [curve for curve in curves if curve.line == 0] or list(curves)
    last = first[-1].points[-1]
    alt = f"Training loss, {last.record.get('loss', np.nan):.3f} at {last.tokens:,} tokens"
    means = [mean_loss(row) for curve in first for row in curve.held_out(text)[1]]
    if means:
        alt += f"; held-out loss {means[0]:.3f} first, {means[-1]:.3f} last"
    pictures = [Picture("all domains", alt, paint, WIDE)]
    pictures += _divergence(curves)
    long = any(len(curve.points) >= 2 * SMOOTHING for curve in curves)
    legend = [("c0", "training text" + (", smoothed" if long else ""))]
    if several:
        legend = [("c0", f"{lines[0].name}: training text" + (", smoothed" if long else ""))]
    held = f"{lines[0].name}: held-out text" if several else "held-out text"
    legend += [("held", held)] if text is not None else []
    legend += [
        (
            f"c{COLOURS.index(line_colour(index))}",
            f"{one.name}: {'from random weights, ' if one.random else ''}both texts",
        )
        for index, one in enumerate(lines)
        if index
    ]
    legend += [("source", "source model, held-out text")] if source is not None else []
    caption = _caption(
        curves,
        "Loss over training tokens. While units are being removed the loss rises; it should fall "
        "again once the shape is reached, and held-out text should follow training text.",
        "Loss over training tokens; held-out text should follow training text down.",
    )
    if any(len(curve.held_out()[0]) > len(curve.held_out(text)[0]) for curve in curves):
        caption += (
            " Hollow points were measured on other held-out sequences than the newest of the first "
            "line: only filled ones compare."
        )
    return Group("Loss", caption, pictures, legend, wide=True)


def _paint_held_out(
    axis: Any, curve: Curve, text: Text | None, same: bool, colour: str, fill: str
) -> None:
    """Mean held-out losses that were measured on `text`, or those that were not, each apart."""
    x, rows = curve.held_out(text if same else None)
    if not same:
        pairs = [(t, r) for t, r in zip(x, rows, strict=True) if text_of(curve.run, r) != text]
        x, rows = [t for t, _ in pairs], [r for _, r in pairs]
    means = [mean_loss(row) for row in rows]
    style = "o-" if same else "o"
    axis.plot(x, means, style, color=colour, mfc=fill, ms=4.5, lw=1)


def _source(curves: Sequence[Curve], text: Text | None) -> float | None:
    """The source's mean held-out loss, where it was measured on `text`."""
    for curve in curves:
        held = source_held_out(curve.run)
        if held and not curve.baseline and text_of(curve.run, held) == text:
            return mean_loss(held)
    return None


def _divergence(curves: Sequence[Curve]) -> list[Picture]:
    """The divergence from the teacher: what most of a distilled run's objective is."""
    taught = [c for c in curves if any("distill_kl" in point.record for point in c.points)]
    if not taught:
        return []

    def paint(axis: Any) -> None:
        for curve in taught:
            y = curve.values("distill_kl")
            smooth = smoothed(y)
            line(axis, curve.tokens, y if smooth is None else smooth, color=curve.colour)
        _label(axis, taught, "KL (nats per token)", ylim=(0, None))

    values = [v for curve in taught for v in curve.values("distill_kl") if v == v]
    alt = f"Divergence from the teacher, {values[0]:.3f} first, {values[-1]:.3f} last"
    return [Picture("divergence from the teacher", alt, paint, WIDE)]


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


def domains(lines: Sequence[Line], curves: Sequence[Curve]) -> Group:
    """Held-out loss and weight of each domain over tokens, for each line of runs."""
    records = [point.record for curve in curves for point in curve.points]
    keys = ("domain_weights", "domain_loss", "held_out")
    names = sorted({name for record in records for key in keys for name in record.get(key) or {}})
    pictures, dotted = [], False
    for index in sorted({curve.line for curve in curves}):
        own = [curve for curve in curves if curve.line == index]
        text = newest_text(own)
        suffix = f": {lines[index].name}" if len({curve.line for curve in curves}) > 1 else ""
        before = next((held for c in own if (held := source_held_out(c.run))), {})
        if not any(text_of(c.run, before) == text for c in own):
            before = {}
        if any(curve.held_out(text)[0] for curve in own):
            alt = f"Held-out loss of {len(names)} domains over tokens"
            paint = partial(_paint_domains, curves=own, names=names, before=before, text=text)
            pictures.append(Picture(f"held-out loss{suffix}", alt, paint, WIDE))
            dotted = dotted or bool(before)
        weights = [w for c in own for p in c.points if (w := p.record.get("domain_weights"))]
        if weights:
            last = sorted(weights[-1].items())
            alt = "Domain weights over tokens; last: "
            alt += ", ".join(f"{name} {weight:.3f}" for name, weight in last)
            paint = partial(_paint_weights, curves=own, names=names)
            pictures.append(Picture(f"weight in the training data{suffix}", alt, paint, WIDE))
    words = (
        "A dynamic mixture gives weight to domains that are further above their reference loss; "
        "weights that lie still from the start belong to a fixed one."
        + (" Dotted: the source model's held-out loss." if dotted else "")
    )
    measured = {name for record in records for name in record.get("held_out") or {}}
    missing = [name for name in names if name not in measured]
    if measured and missing:
        words += f" Without held-out text: {', '.join(missing)}."
    legend = [
        (f"c{index % len(COLOURS)}" + (" dashed" if index >= len(COLOURS) else ""), name)
        for index, name in enumerate(names)
    ]
    return Group("Domains", _caption(curves, words, words), pictures, legend, wide=True)


def _paint_domains(
    axis: Any,
    curves: Sequence[Curve],
    names: Sequence[str],
    before: dict[str, dict[str, float]],
    text: Text | None,
) -> None:
    for index, name in enumerate(names):
        style = _domain_style(index)
        for curve in curves:
            x, rows = curve.held_out(text)
            y = [row.get(name, {}).get("loss", np.nan) for row in rows]
            axis.plot(x, y, marker="o", markersize=4, **style)
        if name in before:
            axis.axhline(before[name]["loss"], **(style | {"linestyle": ":", "linewidth": 1}))
    _label(axis, curves, "held-out loss")


def _paint_weights(axis: Any, curves: Sequence[Curve], names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        for curve in curves:
            weights = [point.record.get("domain_weights") or {} for point in curve.points]
            y = [weight.get(name, np.nan) for weight in weights]
            line(axis, curve.tokens, y, drawstyle="steps-post", **_domain_style(index))
    _label(axis, curves, "domain weight", ylim=(0, None))


def _domain_style(index: int) -> dict[str, Any]:
    style = ("-", "--", "-.")[index // len(COLOURS) % 3]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style, "linewidth": 1.4}


def pace(lines: Sequence[Line], curves: Sequence[Curve]) -> Group:
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
    drawn = sorted({curve.line for curve in curves})
    legend = [(f"c{COLOURS.index(line_colour(i))}", lines[i].name) for i in drawn]
    return Group("Learning rate and speed", caption, pictures, legend if len(drawn) > 1 else [])


def _paint_pace(axis: Any, curves: Sequence[Curve], key: str, unit: str) -> None:
    for curve in curves:
        line(axis, curve.tokens, curve.values(key), color=curve.colour)
    _label(axis, curves, unit, ylim=(0, None))


def _label(axis: Any, curves: Sequence[Curve], ylabel: str, **limits: Any) -> None:
    """Names the axes, of which x is in tokens, and draws a line between runs."""
    from matplotlib.ticker import EngFormatter

    axis.set(xlabel="training tokens", ylabel=ylabel, **limits)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for end in _borders(curves):
        axis.axvline(end, color=INK, linewidth=0.8, alpha=0.6)
