"""Pictures of the report about masks: which units a shearing run keeps, and how they settle."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from launch.report.figures import (
    ORANGE,
    WIDE,
    Group,
    Picture,
    band,
    cells,
    label_axes,
    line,
)
from launch.report.run_folder import Run, removed_layers
from pruner.history import BINS, COLUMNS, decode_mask, group_means
from pruner.shapes import shape_of
from pruner.units import LABELS, label, unit_sizes

INDEX = "index in the source model"
COMPONENT = "principal component of the source's residual stream"
LINED_COLUMNS = 64
"""Most columns of a heat map with lines between its cells."""
SETTLE_ROWS = 240
"""Most rows of a picture with one row per unit; more units are averaged."""


def mask_groups(run: Run) -> list[Group]:
    """Everything that can be drawn about the masks of a shearing run."""
    groups = [kept_units(run), on_over_time(run)]
    if run.history:
        groups += [histograms(run), settling(run), multipliers(run)]
    return [group for group in groups if group is not None and group.pictures]


def kept_units(run: Run) -> Group | None:
    """The newest masks of every kind, by layer where it has one row or more per layer."""
    if not run.masks:
        return None
    dropped = removed_layers(run)
    finished = run.masks_step is None
    layered = _layered(run)
    pictures = []
    for name, (values, units) in sorted(layered.items(), key=lambda item: len(item[1][0])):
        if values.shape[0] == 1:
            rotated = name == label("hidden") and run.identity.get("masks.basis") == "principal"
            pictures.append(_strip(name, values, units, COMPONENT if rotated else INDEX))
        else:
            pictures.append(_heat_map(name, values, units, dropped))
    when = "of the extracted model" if finished else f"at step {run.masks_step:,}"
    caption = f"Masks {when}, one column per unit"
    if any(units > COLUMNS for _, units in layered.values()):
        caption += f"; more than {COLUMNS} columns are averaged in groups of neighbours"
    caption += ". Look for layers that keep other units than their neighbours."
    if dropped:
        marked = "were removed whole" if finished else "are off at this step"
        caption += f" Layers marked × {marked}."
    if run.report is not None and not run.report["polarised"]:
        caption += (
            " Units that were kept with a mask near 0 look removed here; the tables count them."
        )
    legend = [("ramp", "mask 0 (removed) to 1 (kept)")]
    return Group("Kept units", caption, pictures, legend, wide=True)


def _layered(run: Run) -> dict[str, tuple[np.ndarray, int]]:
    """The newest masks [rows, columns] and the units of a row, by name; query heads as
    [layers, heads] whichever kinds they come from."""
    shown = dict(run.masks)
    group = run.model.num_heads // run.model.num_kv_heads
    heads = None
    if "kv_group" in shown:
        heads = np.repeat(shown.pop("kv_group"), group, axis=1)
    if "query_head" in shown:
        own = shown.pop("query_head").reshape(run.model.num_layers, -1)
        heads = own if heads is None else heads * own
    sizes = unit_sizes(shape_of(run.model))
    layered = {label(name): (values, sizes[name][1]) for name, values in shown.items()}
    if heads is not None:
        layered["query heads per layer"] = (heads, heads.shape[1])
    return layered


def _paint_masks(axis: Any, values: np.ndarray, units: int) -> None:
    """Masks [rows, columns] of rows of `units`, averaged to COLUMNS columns where there are more;
    lines lie between cells that are wide enough."""
    drawn = group_means(values, COLUMNS) if values.shape[1] > COLUMNS else values
    edges = np.linspace(0, units, drawn.shape[1] + 1) - 0.5
    lined = drawn.shape[1] <= LINED_COLUMNS
    cells(axis, edges, np.arange(len(drawn) + 1) - 0.5, drawn, lined=lined)


def _strip(name: str, values: np.ndarray, units: int, axis_label: str) -> Picture:
    """A kind of one row as a strip of cells."""

    def paint(axis: Any) -> None:
        _paint_masks(axis, values, units)
        label_axes(axis, axis_label, None, yticks=[])
        axis.spines["left"].set_visible(False)

    alt = f"Strip of {units} {name}, average mask {values.mean():.2f}, by {axis_label}"
    return Picture(name, alt, paint, (WIDE[0], 0.85), grid=False)


def _heat_map(name: str, values: np.ndarray, units: int, dropped: list[int]) -> Picture:
    """Masks [layers, columns] with removed layers greyed out and marked."""
    layers = len(values)

    def paint(axis: Any) -> None:
        _paint_masks(axis, values, units)
        for layer in dropped:
            axis.axhspan(layer - 0.5, layer + 0.5, color="white", alpha=0.72, linewidth=0)
            where = axis.get_yaxis_transform()
            axis.text(1.015, layer, "×", transform=where, color=ORANGE, va="center", fontsize=8)
        label_axes(axis, INDEX, "layer", whole="xy", ylim=(layers - 0.5, -0.5))

    alt = f"Heat map of {name}: {layers} layers, average mask {values.mean():.2f}"
    if dropped:
        alt += f"; removed layers: {', '.join(map(str, dropped))}"
    height = min(max(0.7 + 0.105 * layers, 1.6), 7.0)
    return Picture(name, alt, paint, (WIDE[0], height), grid=False)


def on_over_time(run: Run) -> Group:
    """Units that are on, and targets, of each kind over the steps."""
    pictures = []
    for kind in (name for name in LABELS if run.metrics and f"alive_{name}_min" in run.metrics[-1]):
        keys = ("step", f"alive_{kind}_min", f"alive_{kind}", f"alive_{kind}_max", f"target_{kind}")
        rows = [[record.get(key, np.nan) for key in keys] for record in run.metrics]
        series = np.array(rows, float).T
        steps, low, _, high, target = series
        alt = (
            f"{label(kind)} that are on, over steps: {low[0]:g} to {high[0]:g} at step "
            f"{steps[0]:g}, {low[-1]:g} to {high[-1]:g} at step {steps[-1]:g}, target then "
            f"{target[-1]:g}"
        )
        pictures.append(Picture(label(kind), alt, partial(_paint_counts, series=series)))
    caption = (
        "Units whose mask is at least 0.99. The band spans all rows of a kind (layers, or KV "
        "heads), so it should close on the target: units below it are still between 0 and 1."
    )
    legend = [("c0", "on, mean over rows"), ("band", "smallest to largest row")]
    return Group("Units that are on", caption, pictures, [*legend, ("target", "target")])


def _paint_counts(axis: Any, series: np.ndarray) -> None:
    steps, low, mean, high, target = series
    band(axis, steps, low, mean, high)
    line(axis, steps, target, color=ORANGE, linestyle="--")
    label_axes(axis, "step", "units per row", ylim=(0, 1.05 * np.nanmax(series[1:])))


def histograms(run: Run) -> Group:
    """How the masks of each kind spread over 0 .. 1 at the recorded steps."""
    edges = step_edges([record["step"] for record in run.history])
    pictures = []
    for kind in run.history[-1]["families"]:
        counts = np.array([r["families"][kind]["histogram"] for r in run.history], float)
        shares = counts / counts.sum(1, keepdims=True)

        def paint(axis: Any, shares: np.ndarray = shares) -> None:
            cells(axis, edges, np.linspace(0, 1, BINS + 1), shares.T, power=0.4)
            label_axes(axis, "step", "mask")

        middle = shares[-1, 1:-1].sum()
        alt = f"Distribution of {label(kind)} masks over steps: {middle:.1%} between at the end"
        pictures.append(Picture(label(kind), alt, paint, grid=False))
    caption = (
        "Share of a kind's masks at each value from 0 to 1 (20 bins; the scale lifts small "
        "shares). The middle should empty, leaving a line at 0 and one at 1; what stays between is "
        "half kept."
    )
    return Group("Distribution of the masks", caption, pictures, [("ramp", "share 0 to 1")])


def step_edges(steps: Sequence[float]) -> np.ndarray:
    """Borders [n + 1] of cells around increasing `steps` [n]: half-way between neighbours."""
    middles = (np.array(steps[1:], float) + np.array(steps[:-1], float)) / 2
    return np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])


def settling(run: Run) -> Group | None:
    """Every unit's mask over time, for kinds whose snapshots hold all units."""
    snapshots = [record for record in run.history if "masks" in record]
    if not snapshots:
        return None
    edges = step_edges([record["step"] for record in snapshots])
    pictures, averaged = [], []
    for kind, sizes in snapshots[-1]["families"].items():
        if snapshots[-1]["masks"][kind]["columns"] < sizes["units"]:
            averaged.append(label(kind))
            continue
        units = np.stack([decode_mask(r["masks"][kind]).ravel() for r in snapshots], axis=1)
        by = "layer"
        if kind != "layer":
            by = "unit, by its average mask"
            units = units[np.argsort(-units.mean(1), kind="stable")]
        total = sizes["rows"] * sizes["units"]
        alt = f"Masks of all {total} units of kind {label(kind)} at {len(snapshots)} steps"
        paint = _settling_painter(edges, units, by)
        pictures.append(Picture(label(kind), alt, paint, grid=False))
    caption = (
        "One line per unit, from its first mask on the left to its last on the right. Lines that "
        "keep their colour were decided early; lines that change late are close calls."
    )
    if averaged:
        caption += (
            f" Not shown: {' and '.join(averaged)}. There are too many of them to record each; the "
            "history holds averages of neighbours."
        )
    return Group("How units settled", caption, pictures, [("ramp", "mask 0 to 1")])


def _settling_painter(edges: np.ndarray, units: np.ndarray, by: str) -> Callable[[Any], None]:
    total = len(units)
    drawn = group_means(units.T, SETTLE_ROWS).T if total > SETTLE_ROWS else units

    def paint(axis: Any) -> None:
        cells(axis, edges, np.linspace(0, total, len(drawn) + 1) - 0.5, drawn)
        label_axes(axis, "step", by, whole="xy", ylim=(total - 0.5, -0.5))

    return paint


def multipliers(run: Run) -> Group:
    """The multiplier of each kind's count, and the temperature."""
    steps = [record["step"] for record in run.history]
    pictures = []
    for kind in run.history[-1]["families"]:
        values = [r["families"][kind]["multipliers"] or [np.nan] for r in run.history]
        ends = np.array([[min(row), sum(row) / len(row), max(row)] for row in values]).T

        def paint(axis: Any, ends: np.ndarray = ends) -> None:
            band(axis, steps, *ends)
            label_axes(axis, "step", "multiplier")

        alt = f"Multiplier of {label(kind)} over steps, {ends[1][0]:.3g} to {ends[1][-1]:.3g}"
        pictures.append(Picture(label(kind), alt, paint))
    heat = [record["temperature"] for record in run.history]

    def paint_temperature(axis: Any) -> None:
        line(axis, steps, heat)
        label_axes(axis, "step", "temperature", ylim=(0, None))

    alt = f"Temperature over steps, {heat[0]:.3g} to {heat[-1]:.3g}"
    pictures.append(Picture("temperature", alt, paint_temperature))
    if run.identity.get("masks.rule") in ("paper", "sheared-llama"):
        meaning = "The linear multiplier of the penalty on a kind's expected count."
    else:
        meaning = "The score a unit must exceed to be kept: the multiplier of its row's count."
    caption = (
        f"{meaning} It should level out once the target stops moving; one that runs away belongs "
        "to a count that is hard to meet. The temperature is the width of the masks' transition."
    )
    legend = [("c0", "mean over rows"), ("band", "smallest to largest row")]
    return Group("Multipliers and temperature", caption, pictures, legend)
