"""Searches that come before a run of pruning: for the shape within a budget, and for the widths of
layers."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data.log import logger
from pruner.config import CALIBRATION_SEQUENCES
from pruner.inputs import Inputs, open_inputs
from pruner.layer_widths import WidthSearch, keep_selection, kept_selection, widths_path
from pruner.measurements import sequences_ahead
from pruner.proposal import ALTERNATIVES, OPEN_FILE, settled
from pruner.selection import Selection
from pruner.shape_search import FOLDER, ShapeSearch
from pruner.shapes import parse_target
from trainer.identity import read_identity, require_own, require_same_options
from trainer.models.decoder import CausalLM
from trainer.models.sources import weights_fingerprint
from trainer.parallel import DistributedContext, compute_dtype
from trainer.run import build_model, pretrained
from trainer.saving import publish


def with_shape(
    inputs: Inputs, proposal: dict[str, Any] | None, context: DistributedContext
) -> tuple[Inputs, dict[str, Any] | None]:
    """`inputs` with the best of the shapes that a `proposal` leaves open, and that proposal."""
    if proposal is None or ALTERNATIVES not in proposal:
        return inputs, proposal
    config, output = inputs.config, Path(inputs.config.output)
    context.raise_on_any_rank(lambda: require_own(output) if context.is_main else None)
    # An interrupted search goes on among the same shapes, though times would be others now.
    publish(context, proposal, output / OPEN_FILE)
    if config.masks.init in ("flat", "second-order"):
        logger.info(
            f"note: shapes are compared by the strength of activations; --init {config.masks.init} "
            "chooses the units of the one that is taken"
        )
    shapes = [parse_target(text, inputs.source) for text in proposal[ALTERNATIVES]]
    if config.layer_widths == "free":
        # The others leave no channels to move.
        shapes = [one for one in shapes if one.ffn < inputs.source.ffn and one.layers > 1] or shapes
    path = output / FOLDER / f"{_key(inputs, context)[:16]}.json"
    texts = _texts(inputs)
    found = ShapeSearch(_source(inputs, context), config, *texts, context, path).best(shapes)
    proposal = settled(proposal, found, inputs.model)
    with context.rank_zero_first():
        return open_inputs(replace(config, target=found["shape"])), proposal


def with_widths(inputs: Inputs, context: DistributedContext) -> Inputs:
    """`inputs` with the units of the best widths, if layers may differ in them (--layer-widths);
    collective. What was found before in the output folder is not searched for again."""
    config, output = inputs.config, Path(inputs.config.output)
    if config.layer_widths == "uniform":
        return inputs

    def check() -> str | None:
        require_own(output)
        if not (output / "shear.json").exists():
            return None
        # Before anything is searched that a finished run has no use for.
        require_same_options(output, _compared(inputs))
        saved = (read_identity(output) or {}).get("selection")
        return saved if isinstance(saved, str) else None

    known = context.raise_on_any_rank(check if context.is_main else lambda: None)
    known = context.broadcast(known)
    if known is not None:
        return replace(inputs, selection=Selection(inputs.target, {}, None, noted_key=known))
    path = widths_path(config, inputs.target, _key(inputs, context))
    found = kept_selection(path, inputs.target, context)
    if found is None:
        texts = _texts(inputs)
        sizes = (inputs.target, inputs.source)
        file = path.with_suffix(".json")
        found = WidthSearch(_source(inputs, context), config, *sizes, *texts, context, file).best()
        keep_selection(path, found, context)
    return replace(inputs, selection=found)


def _compared(inputs: Inputs) -> dict[str, Any]:
    """What decides which units a search finds, as a run's identity names it."""
    config = inputs.config
    refit = {f"refit.{name}": value for name, value in asdict(config.refit).items()}
    return refit | {
        "layer_widths": config.layer_widths,
        "target": inputs.target.describe(),
        "source": weights_fingerprint(inputs.folder),
        "data": inputs.reader.fingerprint,
        "seed": config.train.seed,
        "seq_len": config.train.seq_len,
    }


def _key(inputs: Inputs, context: DistributedContext) -> str:
    """Tells source, text and scores apart; for which shape does not matter, because all shapes of a
    search share what is measured."""
    config, masks = inputs.config, inputs.config.masks
    precision = compute_dtype(config.train.precision, context.device)
    parts = [inputs.source_key, inputs.reader.fingerprint, config.train.seq_len, str(precision)]
    parts += [masks.init, masks.basis, masks.calibration_sequences, masks.norm_scale]
    parts += [config.domain_weights, config.train.seed, asdict(config.refit)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _source(inputs: Inputs, context: DistributedContext) -> CausalLM:
    load = pretrained(inputs.folder)
    train = inputs.config.train
    return build_model(inputs.model, train, context, load=load, frozen=True).eval()


def _texts(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Sequences to score units on, and those to refit and to measure on."""
    config = inputs.config
    calibrated = config.masks.calibration_sequences or CALIBRATION_SEQUENCES
    refitted = config.refit.refit_sequences + config.refit.refit_held_out
    weights = inputs.domains.weights
    calibration, ids = (
        sequences_ahead(config, inputs.reader, weights, number) for number in (calibrated, refitted)
    )
    return calibration, ids
