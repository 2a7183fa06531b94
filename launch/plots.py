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
GREY = "0.45"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl file, one per step."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _figure(columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        1, columns, figsize=(4.2 * columns, 3.4), squeeze=False, layout="constrained"
    )


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def plot_alive(records: list[dict[str, Any]], path: Path) -> Path:
    """Alive units (mask at least 0.99) of each family over the steps, beside the target count.

    The line is the mean over the family's rows, the band their minimum to maximum.
    """
    present = [name for name in FAMILIES if f"alive_{name}" in records[0]]
    figure, axes = _figure(len(present))
    steps = [record["step"] for record in records]
    for axis, name in zip(axes[0], present, strict=True):
        values = {
            key: [record[f"{key}_{name}{suffix}"] for record in records]
            for key, suffix in (("alive", ""), ("target", ""))
        }
        low = [record[f"alive_{name}_min"] for record in records]
        high = [record[f"alive_{name}_max"] for record in records]
        axis.fill_between(steps, low, high, alpha=0.25, color="C0", linewidth=0)
        axis.plot(steps, values["alive"], color="C0", label="alive (mask ≥ 0.99)")
        axis.plot(steps, values["target"], "--", color=GREY, label="target")
        axis.set(title=FAMILIES[name], xlabel="step", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("units")
    axes[0][0].legend(frameon=False, loc="lower left")
    return _save(figure, path)


def plot_weights(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> Path:
    """Domain weights over the tokens of each run; one panel per run, one colour per domain."""
    figure, axes = _figure(len(runs))
    for axis, (title, records) in zip(axes[0], runs.items(), strict=True):
        tokens = [record["tokens"] for record in records]
        for index, domain in enumerate(sorted(records[0]["domain_weights"])):
            weights = [record["domain_weights"][domain] for record in records]
            axis.step(tokens, weights, where="post", color=f"C{index}", label=domain)
        axis.set(title=title, xlabel="tokens", ylim=(0, None))
    axes[0][0].set_ylabel("domain weight")
    axes[0][-1].legend(frameon=False)
    return _save(figure, path)


def plot_losses(
    shear: list[dict[str, Any]],
    runs: Mapping[str, list[dict[str, Any]]],
    held_out: Mapping[str, float],
    path: Path,
) -> Path:
    """Training loss of shearing (left) and of the runs after it (right), with held-out points.

    `held_out` are reference lines, {label: loss}; each run's own held-out losses come from its
    records and are token-weighted over domains.
    """
    figure, axes = _figure(2)
    for axis, lines, title in (
        (axes[0][0], {"source under masks": shear}, "shearing"),
        (axes[0][1], runs, "continued pre-training"),
    ):
        for index, (label, records) in enumerate(lines.items()):
            tokens = [record["tokens"] for record in records]
            losses = [record["loss"] for record in records]
            axis.plot(tokens, losses, color=f"C{index}", alpha=0.8, label=label)
            points = [(r["tokens"], mean_loss(r["held_out"])) for r in records if r.get("held_out")]
            if points:
                axis.plot(
                    *zip(*points, strict=True), "o", color=f"C{index}", label=f"{label}: held out"
                )
        axis.set(title=title, xlabel="tokens")
    for index, (label, loss) in enumerate(held_out.items()):
        style = ("--", ":", "-.")[index % 3]
        axes[0][1].axhline(loss, color=GREY, linestyle=style, label=label)
    axes[0][0].set_ylabel("loss (nats per token)")
    for axis in axes[0]:
        axis.legend(frameon=False, fontsize="small")
    return _save(figure, path)


def mean_loss(domains: Mapping[str, Mapping[str, float]]) -> float:
    """Token-weighted mean of {domain: {loss, tokens}}."""
    tokens = sum(row["tokens"] for row in domains.values())
    return sum(row["loss"] * row["tokens"] for row in domains.values()) / tokens
