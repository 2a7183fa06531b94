"""Of the shapes that a budget allows, the one that is nearest to the source once it is refitted.

The rule in `pruner.budget` knows proportions, not this source. Here the shapes that it gives for
every depth, and wider ones of fewer channels, are cut by the same scores, refitted on a part of the
text, and compared by the divergence of their predictions from the source's on other text. Each
round takes more text for fewer of them (successive halving, arXiv 1502.07943). The refit belongs
into the comparison: without it a shape of fewer blocks looks far worse than it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from data.log import logger
from data.progress import Progress
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from pruner.config import ShearConfig
from pruner.refitted import cut, importance_of, refitted_divergence
from pruner.shapes import Shape
from trainer.models.decoder import CausalLM
from trainer.parallel import DistributedContext

FOLDER = "shapes"
"""Name of the folder of kept divergences in the output folder."""
STAGES = ((16, 4), (4, 12), (1, 1))
"""Part of the refit's sequences that a round takes, as its inverse, and how many shapes are left
after it, as the inverse of their part in all."""
SHOWN = 8
"""Shapes in the printed table."""


class ShapeSearch:
    """Measures shapes of a source; what is measured is kept in a file. Collective.

    Args:
        model: the source, loaded; it is rotated if `config` says so.
        config: resolved for one of the shapes.
        calibration: [m, S], on which units are scored.
        ids: [n, S], the sequences to refit on and then those held out (--refit-held-out).
        path: the file of what is known.
    """

    def __init__(
        self,
        model: CausalLM,
        config: ShearConfig,
        calibration: Tensor,
        ids: Tensor,
        context: DistributedContext,
        path: Path,
    ) -> None:
        self.model = model
        self.config = config
        self.importance, _ = importance_of(model, config, calibration, context)
        self.refitted = refitted_divergence(model, config, ids, context, path)

    def best(self, shapes: Sequence[Shape]) -> dict[str, Any]:
        """The best of `shapes` under "shape", and what was "compared", the best first."""
        left = list(shapes)
        behind: list[dict[str, Any]] = []
        for share, part in STAGES:
            number = max(1, len(self.refitted.ids) // share)
            with Progress(f"refit on {number}", total=len(left), unit="shape") as bar:
                for shape in left:
                    self.of(shape, number)
                    bar.update(1)
            left.sort(key=lambda shape: self.of(shape, number))
            rows = [
                {"shape": s.describe(), "divergence": self.of(s, number), "sequences": number}
                for s in left
            ]
            survivors = max(1, len(shapes) // part) if share > 1 else 1
            behind = [*rows[survivors:], *behind]
            left = left[:survivors]
        compared = [*rows[:1], *behind]
        _show(compared)
        return {"shape": compared[0]["shape"], "compared": compared}

    def of(self, shape: Shape, number: int) -> float:
        """Mean divergence in nats per held-out token after a refit on the first `number` of the
        sequences; infinite where it is no number."""
        held = self.config.masks.norm_scale == "held"
        return self.refitted.of(
            shape.describe(),
            lambda: cut(self.model.config, self.importance, shape, held),
            number,
        )


@passing_over_what_is_not_shown()
def _show(compared: Sequence[dict[str, Any]]) -> None:
    """Prints the best shapes."""
    table = Table(title=f"the best of {len(compared)} shapes within the budget, refitted")
    table.add_column("shape", no_wrap=True)
    for heading in ("nats from the source", "sequences"):
        table.add_column(heading, justify="right")
    for row in compared[:SHOWN]:
        table.add_row(row["shape"], f"{row['divergence']:.4f}", str(row["sequences"]))
    print_table(table)
    logger.info(f"taken: --target {compared[0]['shape']}")
