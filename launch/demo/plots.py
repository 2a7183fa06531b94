"""PNG pictures of a shearing run and of the training that followed it, from their metrics.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = {
    "hidden": "hidden dimensions",
    "layer": "layers",
    "kv_group": "KV groups per layer",
    "query_head": "query heads per group",
    "intermediate": "FFN channels per layer",
}
GREY = "0.4"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "lines.linewidth": 1.8,
    "axes.axisbelow": True,
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl file, one per step."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        return pyplot.subplots(
            1, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130, facecolor="white")
    pyplot.close(figure)
    return path


def plot_alive(records: list[dict[str, Any]], path: Path) -> Path:
    """Alive units (mask at least 0.99) of each family over the steps, beside the target count.

    The line is the mean over the family's rows, the band their minimum to maximum. A vertical line
    marks the step from which every row is alive in exactly its target count.
    """
    present = [name for name in FAMILIES if f"alive_{name}" in records[0]]
    figure, axes = _figure(len(present), 3.1 * len(present), 3.7)
    steps = [record["step"] for record in records]
    met = first_step_on_target(records, present)
    for axis, name in zip(axes[0], present, strict=True):
        low, high, mean, target = (
            [record[key] for record in records]
            for key in (f"alive_{name}_min", f"alive_{name}_max", f"alive_{name}", f"target_{name}")
        )
        axis.fill_between(
            steps, low, high, alpha=0.2, color="C0", linewidth=0, label="smallest to largest row"
        )
        axis.plot(steps, target, "--", color=GREY, label="target")
        axis.plot(steps, mean, color="C0", label="alive: mask ≥ 0.99")
        if met is not None:
            axis.axvline(met, color="C3", linestyle=":", label="every row on its final target")
        axis.set(title=FAMILIES[name], xlabel="step", ylim=(0, 1.05 * max(*high, *target)))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("units")
    figure.suptitle("Units alive while shearing; masks still between 0 and 1 do not count")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return _save(figure, path)


def first_step_on_target(records: list[dict[str, Any]], families: list[str]) -> int | None:
    """The step from which every row of every family keeps its final target; None if none does."""
    final = {name: records[-1][f"target_{name}"] for name in families}
    first = None
    for record in reversed(records):
        if any(
            record[f"alive_{name}{end}"] != final[name]
            for name in families
            for end in ("_min", "_max")
        ):
            break
        first = record["step"]
    return first


def plot_weights(shear: list[dict[str, Any]], after: list[dict[str, Any]], path: Path) -> Path:
    """Domain weights over the tokens of shearing and of the run after it; one colour per domain."""
    figure, axes = _figure(1, 8, 3.9)
    axis = axes[0][0]
    boundary = shear[-1]["tokens"]
    tokens = [r["tokens"] for r in shear] + [boundary + r["tokens"] for r in after]
    for index, domain in enumerate(sorted(shear[0]["domain_weights"])):
        weights = [record["domain_weights"].get(domain, 0.0) for record in (*shear, *after)]
        axis.step(tokens, weights, where="post", color=f"C{index}", label=domain)
    top = max(max(record["domain_weights"].values()) for record in (*shear, *after))
    axis.set(title="Share of each domain in the training data", ylim=(0, 1.15 * top))
    axis.set_ylabel("domain weight")
    _phases(axis, boundary, tokens[-1])
    figure.legend(loc="outside right center", title="domain", frameon=False)
    return _save(figure, path)


def plot_losses(
    shear: list[dict[str, Any]],
    runs: Mapping[str, list[dict[str, Any]]],
    held_out: Mapping[str, float],
    path: Path,
) -> Path:
    """Training loss of shearing and of the runs after it on one axis of tokens.

    `held_out` are reference lines, {label: loss}. Points are each run's own held-out losses,
    token-weighted over domains.
    """
    figure, axes = _figure(1, 8.6, 4.4)
    axis = axes[0][0]
    boundary = shear[-1]["tokens"]
    last = boundary
    for index, (label, records) in enumerate({"source under masks": shear, **runs}.items()):
        start = 0 if index == 0 else boundary
        tokens = [start + record["tokens"] for record in records]
        last = max(last, tokens[-1])
        axis.plot(tokens, [r["loss"] for r in records], color=f"C{index}", label=label)
        points = [
            (start + r["tokens"], mean_loss(r["held_out"])) for r in records if r.get("held_out")
        ]
        for x, y in points:
            axis.plot(x, y, "o", color=f"C{index}", markeredgecolor="white", markersize=9, zorder=3)
    for index, (label, loss) in enumerate(held_out.items()):
        style = ("--", ":", "-.")[index % 3]
        axis.axhline(loss, color=GREY, linestyle=style, label=f"{label}, held out")
    axis.plot([], [], "o", color=GREY, label="held out, same colour")
    axis.set(title="Loss on training text (lines) and held-out text (points)")
    axis.set_ylabel("loss (nats per token)")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
    _phases(axis, boundary, last)
    figure.legend(loc="outside right center", frameon=False)
    return _save(figure, path)


def _phases(axis: Any, boundary: int, last: int) -> None:
    """Names the two phases above a line between them, and labels the axis of tokens."""
    axis.axvline(boundary, color=GREY, linewidth=1)
    transform = axis.get_xaxis_transform()
    for middle, name in (
        (boundary / 2, "shearing"),
        ((boundary + last) / 2, "continued pre-training"),
    ):
        axis.text(middle, 0.95, name, transform=transform, ha="center", va="center", color=GREY)
    axis.set(xlabel="training tokens", xlim=(0, None))
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")


def mean_loss(domains: Mapping[str, Mapping[str, float]]) -> float:
    """Token-weighted mean of {domain: {loss, tokens}}."""
    tokens = sum(row["tokens"] for row in domains.values())
    return sum(row["loss"] * row["tokens"] for row in domains.values()) / tokens
