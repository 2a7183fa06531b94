"""Pictures of the report page: how they are drawn, and those about masks.

A picture holds axes and numbers only; whatever comes from a file (names of domains) and the legends
are text of the page.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from launch.demo.plots import FAMILIES
from launch.report.run_folder import Run, family_states, removed_layers
from pruner.history import BINS, COLUMNS, decode_mask, group_means

BLUE, ORANGE, INK, FAINT = "#2f6f9f", "#c8553d", "#4a5561", "#e4e8ec"
COLOURS = (BLUE, "#d1812b", "#3d8f6a", "#b0457b", "#7d6bb0", "#8a7a2e", "#4fa7b8", "#6b7580")
RAMP = ("#eef2f5", "#9fc3d9", "#1d4f73")
"""Colours of 0, 1/2 and 1 in heat maps."""
SMALL, WIDE = (3.4, 2.2), (5.4, 3.0)
"""Width and height of pictures in inches: four, or two side by side on a wide screen."""
DPI = 180
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa5b1",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": FAINT,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
MARKED_POINTS = 3
"""A line of fewer points than this is drawn with markers, without which one cannot be seen."""
INDEX = "index in the source model"
COMPONENT = "principal component of the source's residual stream"
LINED_COLUMNS = 64
"""Most columns of a heat map with lines between its cells."""
SETTLE_ROWS = 240
"""Most rows of a picture with one row per unit; more units are averaged."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of the page."""

    title: str
    alt: str
    png: bytes
    size: tuple[int, int]
    """Width and height in pixels."""


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures that show the same thing about different objects, with one explanation."""

    title: str
    caption: str
    """What is drawn, and what to look for."""
    pictures: list[Picture]
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(class of the swatch in the page's style sheet, label)."""
    wide: bool = False
    """Whether the pictures are WIDE instead of SMALL."""


def draw(
    paint: Callable[[Any], None],
    *,
    title: str,
    alt: str,
    size: tuple[float, float] = SMALL,
    grid: bool = True,
) -> Picture:
    """A picture of one pair of axes, filled by `paint`; `size` in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | {"axes.grid": grid}):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=DPI, facecolor="white", metadata={"Software": None})
    pixels = (round(size[0] * DPI), round(size[1] * DPI))
    return Picture(title, alt, buffer.getvalue(), pixels)


def line(axis: Any, x: Sequence[float], y: Sequence[float] | np.ndarray, **options: Any) -> None:
    """Draws a line that is visible also when it has one point."""
    marker = "o" if len(x) < MARKED_POINTS else None
    axis.plot(x, y, **({"color": BLUE, "marker": marker, "markersize": 4} | options))


def whole_numbers(axis: Any) -> None:
    """Labels a linear axis of steps, layers or units at whole numbers only."""
    axis.get_major_locator().set_params(integer=True)


def ramp() -> Any:
    """The colours of heat maps."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shares", RAMP)


def label(family: str) -> str:
    """A family's name in words."""
    return FAMILIES.get(family, family.replace("_", " "))


def mask_groups(run: Run) -> list[Group]:
    """Everything that can be drawn about the masks of a shearing run."""
    groups = [kept_units(run), alive_over_time(run)]
    if run.history:
        groups += [histograms(run), settling(run), multipliers(run)]
    return [group for group in groups if group is not None and group.pictures]


def kept_units(run: Run) -> Group | None:
    """The newest masks of every family, by layer where it has one row or more per layer."""
    if not run.masks:
        return None
    dropped = removed_layers(run)
    finished = run.masks_step is None
    layered = _layered(run)
    pictures = []
    for name, (values, units) in sorted(layered.items(), key=lambda item: len(item[1][0])):
        if values.shape[0] == 1:
            turned = name == label("hidden") and run.identity.get("masks.basis") == "principal"
            pictures.append(_strip(name, values, units, COMPONENT if turned else INDEX))
        else:
            pictures.append(_heat_map(name, values, units, dropped))
    when = "of the extracted model" if finished else f"at step {run.masks_step:,}"
    marked = "were removed whole" if finished else "are switched off at this step"
    wide = any(units > COLUMNS for _, units in layered.values())
    caption = (
        f"Masks {when}, one column per unit"
        + (
            f"; more than {COLUMNS} columns are averaged in groups of neighbours. "
            if wide
            else ". "
        )
        + "Look for layers that keep other units than their neighbours. "
        + (f"Layers marked × {marked}." if dropped else "")
    )
    if run.report is not None and not run.report["polarised"]:
        caption += (
            " Units that were kept with a mask near 0 look removed here; the tables count them."
        )
    legend = [("ramp", "mask 0 (removed) to 1 (kept)")]
    return Group("Kept units", caption, pictures, legend, wide=True)


def _layered(run: Run) -> dict[str, tuple[np.ndarray, int]]:
    """The newest masks [rows, columns] and the units of a row, by name; query heads as
    [layers, heads] whichever families they come from."""
    shown = dict(run.masks)
    group = run.model.num_heads // run.model.num_kv_heads
    heads = None
    if "kv_group" in shown:
        heads = np.repeat(shown.pop("kv_group"), group, axis=1)
    if "query_head" in shown:
        own = shown.pop("query_head").reshape(run.model.num_layers, -1)
        heads = own if heads is None else heads * own
    states = family_states(run)
    layered = {label(name): (values, states[name].units) for name, values in shown.items()}
    if heads is not None:
        layered["query heads per layer"] = (heads, heads.shape[1])
    return layered


def _narrow(values: np.ndarray) -> np.ndarray:
    return group_means(values, COLUMNS) if values.shape[1] > COLUMNS else values


def _cells(axis: Any, edges: Any, rows: Any, cells: np.ndarray) -> None:
    """Draws masks as coloured cells, with lines between those that are wide enough."""
    lines = {"edgecolors": "white", "linewidth": 0.4} if cells.shape[1] <= LINED_COLUMNS else {}
    axis.pcolormesh(edges, rows, cells, cmap=ramp(), vmin=0, vmax=1, **lines)


def _strip(name: str, values: np.ndarray, units: int, axis_label: str) -> Picture:
    """A family of one row as a strip of cells."""
    cells = _narrow(values)

    def paint(axis: Any) -> None:
        edges = np.linspace(0, units, cells.shape[1] + 1) - 0.5
        _cells(axis, edges, [0, 1], cells)
        axis.set(yticks=[], xlabel=axis_label)
        axis.spines["left"].set_visible(False)
        whole_numbers(axis.xaxis)

    alt = f"Strip of {units} {name}, average mask {values.mean():.2f}, by {axis_label}"
    return draw(paint, title=name, alt=alt, size=(WIDE[0], 0.85), grid=False)


def _heat_map(name: str, values: np.ndarray, units: int, dropped: list[int]) -> Picture:
    """Masks [layers, columns] with removed layers greyed out and marked."""
    cells = _narrow(values)
    layers = len(cells)

    def paint(axis: Any) -> None:
        edges = np.linspace(0, units, cells.shape[1] + 1) - 0.5
        rows = np.arange(layers + 1) - 0.5
        _cells(axis, edges, rows, cells)
        for layer in dropped:
            axis.axhspan(layer - 0.5, layer + 0.5, color="white", alpha=0.72, linewidth=0)
            where = axis.get_yaxis_transform()
            style = {"color": ORANGE, "va": "center", "fontsize": 8}
            axis.text(1.015, layer, "×", transform=where, **style)
        axis.set(xlabel=INDEX, ylabel="layer", ylim=(layers - 0.5, -0.5))
        whole_numbers(axis.xaxis)
        whole_numbers(axis.yaxis)

    alt = f"Heat map of {name}: {layers} layers, average mask {values.mean():.2f}"
    if dropped:
        alt += f"; removed layers: {', '.join(map(str, dropped))}"
    height = min(max(0.7 + 0.105 * layers, 1.6), 7.0)
    return draw(paint, title=name, alt=alt, size=(WIDE[0], height), grid=False)


def alive_over_time(run: Run) -> Group | None:
    """Alive units and targets of each family over the steps, from the history or the metrics."""
    pictures = []
    for family, units, series in _alive_series(run):
        steps, low, _, high, target = series

        def paint(axis: Any, series: Any = series, units: float = units) -> None:
            steps, low, mean, high, target = series
            axis.fill_between(steps, low, high, alpha=0.22, color=BLUE, linewidth=0)
            line(axis, steps, mean)
            line(axis, steps, target, color=ORANGE, linestyle="--")
            axis.set(xlabel="step", ylabel="units per row", ylim=(0, 1.05 * units))
            whole_numbers(axis.xaxis)

        alt = (
            f"Alive {label(family)} over steps: {low[0]:g} to {high[0]:g} at step {steps[0]}, "
            f"{low[-1]:g} to {high[-1]:g} at step {steps[-1]}, target then {target[-1]:g}"
        )
        pictures.append(draw(paint, title=label(family), alt=alt))
    caption = (
        "Units whose mask is at least 0.99. The band spans all rows of a family (layers, or KV "
        "groups), so it should close on the target: units below it are still between 0 and 1."
    )
    legend = [("c0", "alive, mean over rows"), ("band", "smallest to largest row")]
    return Group("Alive units", caption, pictures, [*legend, ("target", "target")])


def _alive_series(run: Run) -> list[tuple[str, float, np.ndarray]]:
    """(family, units of a row, [steps, low, mean, high, target]) of each family."""
    series = []
    if run.history:
        steps = [record["step"] for record in run.history]
        for name, last in run.history[-1]["families"].items():
            rows = [record["families"][name] for record in run.history]
            counts = np.array([row["alive"] for row in rows])
            ends = (counts.min(1), counts.mean(1), counts.max(1))
            target = [row["current_target"] for row in rows]
            series.append((name, float(last["units"]), np.array([steps, *ends, target])))
        return series
    records = run.metrics
    names = [name for name in FAMILIES if records and f"alive_{name}_min" in records[-1]]
    for name in names:
        keys = ("step", f"alive_{name}_min", f"alive_{name}", f"alive_{name}_max", f"target_{name}")
        values = np.array([[record[key] for record in records] for key in keys], float)
        series.append((name, float(values[1:].max()), values))
    return series


def histograms(run: Run) -> Group:
    """How the masks of each family spread over 0 .. 1 at the recorded steps."""
    from matplotlib.colors import PowerNorm

    edges = step_edges([record["step"] for record in run.history])
    pictures = []
    for family in run.history[-1]["families"]:
        counts = np.array([r["families"][family]["histogram"] for r in run.history], float)
        shares = counts / counts.sum(1, keepdims=True)

        def paint(axis: Any, shares: np.ndarray = shares) -> None:
            norm = PowerNorm(0.4, vmin=0, vmax=1)
            axis.pcolormesh(edges, np.linspace(0, 1, BINS + 1), shares.T, cmap=ramp(), norm=norm)
            axis.set(xlabel="step", ylabel="mask")
            whole_numbers(axis.xaxis)

        middle = shares[-1, 1:-1].sum()
        alt = f"Distribution of {label(family)} masks over steps: {middle:.1%} between at the end"
        pictures.append(draw(paint, title=label(family), alt=alt, grid=False))
    caption = (
        "Share of a family's masks at each value from 0 to 1 (20 bins; the scale lifts small "
        "shares). The middle should empty, leaving a line at 0 and one at 1; what stays between is "
        "half kept."
    )
    return Group("Distribution of the masks", caption, pictures, [("ramp", "share 0 to 1")])


def step_edges(steps: Sequence[float]) -> np.ndarray:
    """Borders [n + 1] of cells around increasing `steps` [n]: half-way between neighbours."""
    middles = (np.array(steps[1:], float) + np.array(steps[:-1], float)) / 2
    return np.concatenate([[steps[0] - 0.5], middles, [steps[-1] + 0.5]])


def settling(run: Run) -> Group | None:
    """Every unit's mask over time, for families whose snapshots hold all units."""
    snapshots = [record for record in run.history if "masks" in record]
    if not snapshots:
        return None
    edges = step_edges([record["step"] for record in snapshots])
    pictures, averaged = [], []
    for family, sizes in snapshots[-1]["families"].items():
        if snapshots[-1]["masks"][family]["columns"] < sizes["units"]:
            averaged.append(label(family))
            continue
        masks = [decode_mask(record["masks"][family]).ravel() for record in snapshots]
        units = np.stack(masks, axis=1)
        if family != "layer":
            units = units[np.argsort(-units.mean(1), kind="stable")]
        if len(units) > SETTLE_ROWS:
            units = group_means(units.T, SETTLE_ROWS).T
        by = "layer" if family == "layer" else "unit, by its average mask"
        total = sizes["rows"] * sizes["units"]

        def paint(axis: Any, units: np.ndarray = units, by: str = by, total: int = total) -> None:
            rows = np.linspace(0, total, len(units) + 1) - 0.5
            axis.pcolormesh(edges, rows, units, cmap=ramp(), vmin=0, vmax=1)
            axis.set(xlabel="step", ylabel=by, ylim=(total - 0.5, -0.5))
            whole_numbers(axis.xaxis)
            whole_numbers(axis.yaxis)

        alt = f"Masks of all {total} units of the family {label(family)} at {len(masks)} steps"
        pictures.append(draw(paint, title=label(family), alt=alt, grid=False))
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


def multipliers(run: Run) -> Group:
    """The multiplier of each family's count, and the temperature."""
    steps = [record["step"] for record in run.history]
    pictures = []
    for family in run.history[-1]["families"]:
        values = [r["families"][family]["multipliers"] or [np.nan] for r in run.history]
        ends = np.array([[min(row), sum(row) / len(row), max(row)] for row in values]).T

        def paint(axis: Any, ends: np.ndarray = ends) -> None:
            axis.fill_between(steps, ends[0], ends[2], alpha=0.22, color=BLUE, linewidth=0)
            line(axis, steps, ends[1])
            axis.set(xlabel="step", ylabel="multiplier")
            whole_numbers(axis.xaxis)

        alt = f"Multiplier of {label(family)} over steps, {ends[1][0]:.3g} to {ends[1][-1]:.3g}"
        pictures.append(draw(paint, title=label(family), alt=alt))
    heat = [record["temperature"] for record in run.history]

    def paint_temperature(axis: Any) -> None:
        line(axis, steps, heat)
        axis.set(xlabel="step", ylabel="temperature", ylim=(0, None))
        whole_numbers(axis.xaxis)

    alt = f"Temperature over steps, {heat[0]:.3g} to {heat[-1]:.3g}"
    pictures.append(draw(paint_temperature, title="temperature", alt=alt))
    if run.identity.get("masks.rule") in ("sheared-llama", "paper"):
        meaning = "The linear multiplier of the penalty on a family's expected count."
    else:
        meaning = "The score a unit must exceed to be kept: the multiplier of its row's count."
    caption = (
        f"{meaning} It should level out once the target stops moving; one that runs away belongs "
        "to a count that is hard to meet. The temperature is the width of the masks' transition."
    )
    legend = [("c0", "mean over rows"), ("band", "smallest to largest row")]
    return Group("Multipliers and temperature", caption, pictures, legend)
