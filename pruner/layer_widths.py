"""How many channels each feed-forward layer keeps, where all together keep a given number.

Layers differ in what a channel of theirs is worth. From the same number in each, an evolutionary
search (pruner.evolution) moves channels from layer to layer, as DarwinLM (arXiv 2502.07780, section
3.2) moves levels of sparsity. Candidates are compared by the divergence of their predictions from
the source's once they are refitted, so that only what the refit cannot mend counts.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import InputError
from data.files import finite_only
from data.log import logger
from data.records import parse_json
from pruner.config import ShearConfig
from pruner.divergence import PARTS
from pruner.evolution import evolve
from pruner.refitted import RefittedDivergence, cut_units, importance_of, refitted_divergence
from pruner.selection import Selection
from pruner.shapes import Shape
from pruner.units import measured_sizes, to_masks, top_units
from trainer.models.decoder import CausalLM
from trainer.models.hf import save_tensors
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext

FOLDER = "widths"
"""Name of the folder of what is measured and found in the output folder."""
GENERATIONS, OFFSPRING = 8, 8
STEPS = 16
"""Parts of the target's channels that are moved at once, as their number in a layer."""
MOST_STEPS = 4
"""Of these parts that one move takes."""
_ROTATION = "basis"
_TOLD = "told"


def moved(widths: tuple[int, ...], draw: random.Random, *, step: int, most: int) -> tuple[int, ...]:
    """`widths` with some channels of one layer given to another: 1 to MOST_STEPS times `step`, few
    being likelier (the lesser of two draws). No layer gives its last `step` channels or gets more
    than `most`; the same widths where nothing can be moved."""
    givers = [index for index, width in enumerate(widths) if width >= 2 * step]
    takers = [index for index, width in enumerate(widths) if width + step <= most]
    if not givers:
        return widths
    giver = draw.choice(givers)
    others = [index for index in takers if index != giver]
    if not others:
        return widths
    taker = draw.choice(others)
    room = min(widths[giver] // step - 1, (most - widths[taker]) // step, MOST_STEPS)
    amount = step * min(draw.randint(1, room), draw.randint(1, room))
    new = list(widths)
    new[giver] -= amount
    new[taker] += amount
    return tuple(new)


class WidthSearch:
    """Finds widths for the layers of a source that `target` keeps; collective.

    Args:
        model: the source, loaded; it is rotated if `config` says so.
        config: resolved for the target.
        calibration: [m, S], on which units are scored.
        ids: [n, S], the sequences to refit on and then those held out.
        path: the file of what is known.
    """

    def __init__(
        self,
        model: CausalLM,
        config: ShearConfig,
        target: Shape,
        source: Shape,
        calibration: Tensor,
        ids: Tensor,
        context: DistributedContext,
        path: Path,
    ) -> None:
        self.config, self.target, self.source = config, target, source
        self.importance, self.rotation = importance_of(model, config, calibration, context)
        self.z = cut_units(self.importance, target, source)
        layers = self.z.get("layer", torch.ones(1, source.layers))[0]
        self.layers: list[int] = torch.nonzero(layers).flatten().tolist()
        """Blocks that are kept."""
        self.refitted: RefittedDivergence = refitted_divergence(model, config, ids, context, path)

    def best(self) -> Selection:
        """The units of the best widths that were found."""
        start = (self.target.ffn,) * len(self.layers)
        step = self.config.align or max(1, self.target.ffn // STEPS)
        logger.info(
            f"searching widths of {len(start)} feed-forward layers with {sum(start):,} channels "
            f"in all, in steps of {step}"
        )
        found = evolve(
            self.of,
            start,
            partial(moved, step=step, most=self.source.ffn),
            generations=GENERATIONS,
            offspring=OFFSPRING,
            seed=self.config.train.seed,
            keep=lambda: None,
        )
        before, after = self.of(start, PARTS), self.of(found, PARTS)
        logger.info(
            f"divergence from the source {before:.4f} -> {after:.4f} nats, with "
            f"{min(found)} to {max(found)} channels in a layer"
        )
        told = {
            "init": self.config.masks.init,
            "search": "layer-widths",
            "widths": dict(zip(map(str, self.layers), found, strict=True)),
            "divergence": {"before": before, "after": after},
            "refits": len(self.refitted.known),
        }
        sizes = measured_sizes(self.source)
        z = {n: torch.ones(size, dtype=torch.float64) for n, size in sizes.items()}
        z |= {name: values.double() for name, values in self._units(found).items()}
        return Selection(self.target, z, self.rotation, told)

    def of(self, widths: tuple[int, ...], parts: int) -> float:
        """Mean divergence of these widths, refitted on so many parts of the sequences."""
        number = max(1, len(self.refitted.ids) * parts // PARTS)
        return self.refitted.of(",".join(map(str, widths)), partial(self._masks, widths), number)

    def _units(self, widths: tuple[int, ...]) -> dict[str, Tensor]:
        rows = self.z["intermediate"].clone()
        for index, width in zip(self.layers, widths, strict=True):
            rows[index] = 0
            rows[index, top_units(self.importance["intermediate"][index], width)] = 1
        return self.z | {"intermediate": rows}

    def _masks(self, widths: tuple[int, ...]) -> Masks:
        held = self.config.masks.norm_scale == "held"
        return to_masks(self._units(widths), self.source, hold_scale=held)


def require_room_for_widths(target: Shape, source: Shape, align: int | None) -> None:
    """Raises InputError where the target leaves no channels to move, or not in steps of `align`."""
    if align is not None and target.ffn % align:
        raise InputError(
            f"--align {align}: the target's {target.ffn} channels are no multiple of it, so that "
            f"widths would be none; use ffn={max(1, target.ffn // align) * align}"
        )
    if target.ffn == source.ffn:
        raise InputError(
            f"--layer-widths free: the target keeps all {source.ffn} channels of every layer, so "
            f"that none can be moved; give it a smaller ffn, or leave --layer-widths out"
        )
    if target.layers < 2:
        raise InputError(
            "--layer-widths free: the target has one block, and channels move between blocks; "
            "leave it out"
        )


def widths_path(config: ShearConfig, target: Shape, key: str) -> Path:
    """File of the selection of `config`, resolved, from a source and text that `key` stands for."""
    own = [key, target.describe(), config.align]
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    return Path(config.output) / FOLDER / f"{digest[:16]}.safetensors"


def keep_selection(path: Path, selection: Selection, context: DistributedContext) -> None:
    """Writes it on rank 0. Raises InputError on every rank where that fails."""
    problem = None
    if context.is_main:
        tensors = dict(selection.z)
        if selection.rotation is not None:
            tensors[_ROTATION] = selection.rotation
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, path, {_TOLD: json.dumps(finite_only(selection.told))})
        except (OSError, SafetensorError) as error:
            problem = f"--output {path.parent.parent} cannot be written ({error}); free space"
    context.raise_first(problem)


def kept_selection(path: Path, target: Shape, context: DistributedContext) -> Selection | None:
    """What `keep_selection` wrote, on every rank; None where it is not there or damaged."""
    found = context.broadcast(_read(path) if context.is_main else None)
    if found is None:
        return None
    tensors, told = found
    rotation = tensors.pop(_ROTATION, None)
    return Selection(target, tensors, rotation, told)


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]] | None:
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata() or {}
        return tensors, parse_json(metadata.get(_TOLD, ""), str(path), "", keys={"init": str})
    except (OSError, SafetensorError, InputError):
        return None
