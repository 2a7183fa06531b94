"""Of the shapes that a budget allows, the one whose cut is nearest to the source.

The rule in `pruner.budget` knows proportions, not this source. Here the shapes that it gives for
every depth, and a little wider and narrower ones, are cut at once by the same scores, as masks on
the loaded source, and compared by the divergence of their predictions from the source's. Each round
reads twice as much text of the better half of them (successive halving, arXiv 1502.07943).
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from data.log import logger
from data.progress import Progress
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from pruner.config import ShearConfig
from pruner.divergence import PARTS, Divergence
from pruner.importance import measure
from pruner.rotation import measure_rotation, rotate
from pruner.shapes import Shape, shape_of
from pruner.units import indicator, to_masks, unit_kinds
from trainer.models.decoder import CausalLM
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext, reshard

FOLDER = "shapes"
"""Name of the folder of kept divergences in the output folder."""
SEQUENCES = 64
"""Most of the calibration sequences on which shapes are compared."""
SHOWN = 8
"""Shapes in the printed table."""


def search_shapes(
    model: CausalLM,
    shapes: Sequence[Shape],
    config: ShearConfig,
    sequences: Tensor,
    context: DistributedContext,
    path: Path,
) -> dict[str, Any]:
    """The best of `shapes` under "shape", and what was "compared", the best first; collective.

    Args:
        model: the source, loaded; it is rotated if `config` says so.
        shapes: valid ones, in the order in which ties are decided.
        config: resolved for one of them.
        sequences: [n, S], the calibration set.
        path: file of what is known, which a search that is run again goes on from.
    """
    batch, masks = config.train.micro_batch, config.masks
    if masks.basis == "principal":
        rotate(model, measure_rotation(model, sequences, context, batch))
    kind = "importance" if masks.init in (None, "flat", "second-order") else masks.init
    found = measure(kind, model, sequences, context, batch)
    reshard(model)
    importance = {name: values[0].to(context.device) for name, values in found.items()}
    divergence = Divergence(model, sequences[:SEQUENCES], context, batch, path)
    held = masks.norm_scale == "held"

    def of(shape: Shape, parts: int) -> float:
        return divergence.of(shape.describe(), partial(cut, model, importance, shape, held), parts)

    ranked = _halve(shapes, of, divergence.keep)
    best = ranked[0]
    compared = [
        {
            "shape": shape.describe(),
            "divergence": of(shape, parts),
            "sequences": min(parts * len(divergence.parts[0]), len(sequences[:SEQUENCES])),
        }
        for shape, parts in ranked
    ]
    _show(compared)
    return {"shape": best[0].describe(), "compared": compared}


def cut(model: CausalLM, importance: dict[str, Tensor], target: Shape, held: bool) -> Masks:
    """Masks of the most important units, as many as `target` keeps; `importance` [rows, units] of
    each kind, `held` as Masks.hold_scale."""
    source = shape_of(model.config)
    kinds = unit_kinds(target, source)
    z = {name: indicator(importance[name], kind.target) for name, kind in kinds.items()}
    return to_masks(z, source, hold_scale=held).compact(model.config, multiple=1)


def _halve(
    shapes: Sequence[Shape], of: Callable[[Shape, int], float], keep: Callable[[], None]
) -> list[tuple[Shape, int]]:
    """All shapes with the parts of the text that were read of each: those of which more was read
    first, and among them the better."""
    left, parts = list(shapes), 1
    behind: list[tuple[Shape, int]] = []
    with Progress("compare shapes", total=len(shapes), unit="shape") as bar:
        while True:
            left.sort(key=lambda shape: of(shape, parts))
            keep()
            if len(left) == 1 or parts == PARTS:
                bar.update(len(left))
                return [*((shape, parts) for shape in left), *behind]
            half = -(-len(left) // 2)
            behind = [*((shape, parts) for shape in left[half:]), *behind]
            bar.update(len(left) - half)
            left, parts = left[:half], 2 * parts


@passing_over_what_is_not_shown()
def _show(compared: Sequence[dict[str, Any]]) -> None:
    """Prints the best shapes."""
    table = Table(title=f"the best of {len(compared)} shapes within the budget")
    table.add_column("shape", no_wrap=True)
    for heading in ("nats from the source", "sequences"):
        table.add_column(heading, justify="right")
    for row in compared[:SHOWN]:
        table.add_row(row["shape"], f"{row['divergence']:.4f}", str(row["sequences"]))
    print_table(table)
    logger.info(f"taken: --target {compared[0]['shape']}")
