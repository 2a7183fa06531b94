"""Of the shapes that a budget allows, the one that is nearest to the source once it is refitted.

The rule in `pruner.budget` knows proportions, not this source. Here the shapes that it gives for
every depth, and wider ones of fewer channels, are cut by the same scores, refitted on a part of the
text, and compared by the divergence of their predictions from the source's on other text. Each
round takes more text for fewer of them (successive halving, arXiv 1502.07943). The refit belongs
into the comparison: without it a shape of fewer blocks looks far worse than it is.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from data.log import logger
from data.progress import Progress
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from pruner.config import ShearConfig
from pruner.extract import Extraction
from pruner.importance import measure
from pruner.kept_values import keep_values, read_values
from pruner.refit import Refit, carry
from pruner.rotation import measure_rotation, rotate
from pruner.shapes import Shape, shape_of
from pruner.units import indicator, to_masks, unit_kinds
from trainer.kernels.linear_cross_entropy import TeacherOutput, linear_distillation
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.layers import LayerNorm, RMSNorm
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext, compute_dtype, reshard
from trainer.saving import full_tensors

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
        batch, masks = config.train.micro_batch, config.masks
        if masks.basis == "principal":
            rotate(model, measure_rotation(model, calibration, context, batch))
        kind = "importance" if masks.init in (None, "flat", "second-order") else masks.init
        found = measure(kind, model, calibration, context, batch)
        reshard(model)
        self.importance = {name: values[0] for name, values in found.items()}
        self.model = model
        self.config = config
        self.context = context
        self.path = path
        cut = len(ids) - min(config.refit.refit_held_out, len(ids) // 4)
        self.ids, self.held_out = ids[:cut], ids[cut:]
        self.known: dict[str, float] = read_values(path, {"*": float}, context)

    def best(self, shapes: Sequence[Shape]) -> dict[str, Any]:
        """The best of `shapes` under "shape", and what was "compared", the best first."""
        left = list(shapes)
        behind: list[dict[str, Any]] = []
        for share, part in STAGES:
            number = max(1, len(self.ids) // share)
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
        name = f"{shape.describe()} on {number}"
        if name not in self.known:
            self.known[name] = self._measure(shape, number)
            finite = {text: value for text, value in self.known.items() if value < math.inf}
            keep_values(self.path, finite, self.context)
        return self.known[name]

    @torch.no_grad()
    def _measure(self, shape: Shape, number: int) -> float:
        context, config = self.context, self.config
        held = config.masks.norm_scale == "held"
        masks = cut(self.model.config, self.importance, shape, held)
        extraction = Extraction(self.model.config, masks)
        own = [ids[context.rank :: context.world] for ids in (self.ids[:number], self.held_out)]
        work = Refit(
            extraction,
            torch.cat(own),
            ridge=config.refit.refit_ridge,
            batch=config.train.micro_batch,
            context=context,
            held_out=len(own[1]),
        )
        outer = Outside(self.model.config)
        tensors = outer.note(full_tensors(self.model))
        pruned = Outside(extraction.config)
        dtype = compute_dtype(config.train.precision, context.device)
        for _ in pruned.note(carry(work, tensors, dtype=dtype)):
            pass
        sums = torch.zeros(2, dtype=torch.float64, device=context.device)
        for ids, streams in list(zip(work.parts, work.streams, strict=True))[work.fitted :]:
            states = [
                outside.states(stream.to(context.device))
                for outside, stream in ((outer, streams.source), (pruned, streams.pruned))
            ]
            targets, valid = next_token_targets(ids.to(context.device))
            teacher = TeacherOutput(states[0], outer.head(context.device), 1.0)
            _, _, divergence = linear_distillation(
                states[1],
                pruned.head(context.device),
                targets.flatten(),
                valid.flatten().float(),
                teacher,
            )
            sums += torch.stack([divergence.double().sum(), valid.double().sum()])
        total, tokens = context.all_reduce_sum(sums).tolist()
        return total / tokens if math.isfinite(total) else math.inf


class Outside:
    """What of a model is outside its blocks, noted while its tensors go by."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.names = config.traits.names
        self.tensors: dict[str, Tensor] = {}

    def note(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same `tensors`."""
        for name, tensor in tensors:
            if not name.startswith(f"{self.names.blocks}."):
                self.tensors[name] = tensor
            yield name, tensor

    def head(self, device: torch.device) -> Tensor:
        """[V, d] fp32."""
        module = self.names.embedding if self.config.tie_embeddings else self.names.head
        return self.tensors[f"{module}.weight"].float().to(device)

    def states(self, stream: Tensor) -> Tensor:
        """Outputs of the final norm [B * S, d] fp32 for the stream [B, S, d] in front of it."""
        kind = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[self.config.traits.norm]
        norm: nn.Module = kind(self.config.hidden_size, self.config.norm_eps)
        prefix = f"{self.names.final_norm}."
        own = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        norm.load_state_dict(own)
        states: Tensor = norm.to(stream.device)(stream.float())
        return states.flatten(0, 1)


def cut(source: ModelConfig, importance: dict[str, Tensor], target: Shape, held: bool) -> Masks:
    """Masks of the most important units, as many as `target` keeps; `importance` [rows, units] of
    each kind, `held` as Masks.hold_scale."""
    shape = shape_of(source)
    kinds = unit_kinds(target, shape)
    z = {name: indicator(importance[name], kind.target) for name, kind in kinds.items()}
    return to_masks(z, shape, hold_scale=held)


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
