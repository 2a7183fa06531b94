"""How the report draws: pictures, and groups of pictures with a legend, as PNG.

A picture holds axes and numbers only. Names that come from a file (domains) and legends are text of
the page; in the PNG file of a group they are written without reading them as formulas.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLUE, ORANGE, INK = "#2f6f9f", "#c8553d", "#4a5561"
COLOURS = (BLUE, "#d1812b", "#3d8f6a", "#b0457b", "#7d6bb0", "#8a7a2e", "#4fa7b8", "#6b7580")
RAMP = ("#eef2f5", "#9fc3d9", "#1d4f73")
"""Colours of 0, 1/2 and 1 in heat maps."""
SMALL, WIDE = (3.4, 2.2), (5.4, 3.0)
"""Width and height of pictures in inches: four, or two side by side on a wide screen."""
DPI = 180
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.color": "#e4e8ec",
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
MARKED_POINTS = 3
"""A line of fewer points than this is drawn with markers, without which one cannot be seen."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One pair of axes."""

    title: str
    alt: str
    paint: Callable[[Any], None]
    """Fills the axes."""
    size: tuple[float, float] = SMALL
    """Width and height in inches."""
    grid: bool = True

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height of `png`."""
        return round(self.size[0] * DPI), round(self.size[1] * DPI)

    def png(self) -> bytes:
        """The axes alone, without the title."""
        return _render(self.size, lambda figure: self.draw(figure.add_subplot()))

    def draw(self, axis: Any) -> None:
        self.paint(axis)
        axis.grid(self.grid)


@dataclass(frozen=True, slots=True)
class Group:
    """Pictures that show the same thing about different objects, with one explanation."""

    title: str
    caption: str
    """What is drawn, and what to look for."""
    pictures: list[Picture]
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(class of the swatch in style.css, label)."""
    wide: bool = False
    """Whether the pictures are WIDE instead of SMALL."""

    def png(self) -> bytes:
        """All pictures in one, with their titles, the group's title and the legend."""
        columns = min(len(self.pictures), 2 if self.wide else 4)
        rows = [self.pictures[i : i + columns] for i in range(0, len(self.pictures), columns)]
        heights = [0.3 + max(picture.size[1] for picture in row) for row in rows]

        def fill(figure: Any) -> None:
            from matplotlib.legend_handler import HandlerTuple

            grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
            for axis in grid.flat[len(self.pictures) :]:
                axis.set_axis_off()
            for axis, picture in zip(grid.flat, self.pictures, strict=False):
                picture.draw(axis)
                axis.set_title(picture.title, parse_math=False)
            figure.suptitle(self.title).set_parse_math(False)
            if self.legend:
                legend = figure.legend(
                    [_swatch(kind) for kind, _ in self.legend],
                    [text for _, text in self.legend],
                    loc="outside lower center",
                    ncols=max(1, 2 * columns),
                    frameon=False,
                    handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
                )
                for text in legend.get_texts():
                    text.set_parse_math(False)

        width = columns * (WIDE if self.wide else SMALL)[0]
        return _render((width, 0.7 + sum(heights)), fill)


def _render(size: tuple[float, float], fill: Callable[[Any], None]) -> bytes:
    """A figure of `size` inches, filled by `fill`, as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure)
        figure.savefig(buffer, dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _swatch(kind: str) -> Any:
    """What style.css draws for a legend's entry, as an artist."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if kind == "ramp":
        return tuple(Patch(color=colour) for colour in RAMP)
    if kind == "band":
        return Patch(color=BLUE, alpha=0.25, linewidth=0)
    lines: dict[str, dict[str, Any]] = {
        "target": {"color": ORANGE, "linestyle": "--"},
        "held": {"color": ORANGE, "marker": "o", "markersize": 4},
        "source": {"color": INK, "linestyle": ":"},
    }
    if kind in lines:
        return Line2D([], [], **lines[kind])
    name, _, dashed = kind.partition(" ")
    return Line2D([], [], color=COLOURS[int(name[1:])], linestyle="--" if dashed else "-")


def line(axis: Any, x: Sequence[float], y: Sequence[float] | np.ndarray, **options: Any) -> None:
    """Draws a line that is visible also when it has one point."""
    marker = "o" if len(x) < MARKED_POINTS else None
    axis.plot(x, y, **({"color": BLUE, "marker": marker, "markersize": 4} | options))


def band(axis: Any, x: Any, low: Any, mean: Any, high: Any) -> None:
    """Draws a mean within its extremes."""
    axis.fill_between(x, low, high, alpha=0.22, color=BLUE, linewidth=0)
    line(axis, x, mean)


def cells(
    axis: Any, x: Any, y: Any, values: np.ndarray, *, power: float = 1, lined: bool = False
) -> None:
    """Draws values [rows, columns] in 0 .. 1 as coloured cells between the edges x and y.

    A `power` below 1 lifts small values; `lined` draws white lines between the cells.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    ramp = LinearSegmentedColormap.from_list("shares", RAMP)
    mesh = axis.pcolormesh(x, y, values, cmap=ramp, norm=PowerNorm(power, vmin=0, vmax=1))
    if lined:
        mesh.set(edgecolor="white", linewidth=0.4)


def label_axes(axis: Any, x: str, y: str | None, *, whole: str = "x", **limits: Any) -> None:
    """Names both axes; those in `whole` count something and get ticks at whole numbers only."""
    axis.set(xlabel=x, ylabel=y, **limits)
    for name in whole:
        getattr(axis, f"{name}axis").get_major_locator().set_params(integer=True)
