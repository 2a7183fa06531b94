"""Searches that come before a run of pruning: for the shape within a budget, and for the widths of
layers."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pruner.config import CALIBRATION_SEQUENCES
from pruner.inputs import Inputs, open_inputs
from pruner.layer_widths import WidthSearch, keep_selection, kept_selection, widths_path
from pruner.measurements import measurements_key, sequences_ahead
from pruner.proposal import ALTERNATIVES, settled
from pruner.shape_search import FOLDER, ShapeSearch
from pruner.shapes import parse_target
from trainer.identity import require_own, require_same_options
from trainer.models.decoder import CausalLM
from trainer.models.sources import weights_fingerprint
from trainer.parallel import DistributedContext
from trainer.run import build_model, pretrained


def with_shape(
    inputs: Inputs, proposal: dict[str, Any] | None, context: DistributedContext
) -> tuple[Inputs, dict[str, Any] | None]:
    """`inputs` with the best of the shapes that a `proposal` leaves open, and that proposal."""
    if proposal is None or ALTERNATIVES not in proposal:
        return inputs, proposal
    config, output = inputs.config, Path(inputs.config.output)
    context.raise_on_any_rank(lambda: require_own(output) if context.is_main else None)
    shapes = [parse_target(text, inputs.source) for text in proposal[ALTERNATIVES]]
    parts = [_key(inputs), asdict(config.refit), config.masks.norm_scale]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = output / FOLDER / f"{digest[:16]}.json"
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
    options = {"layer_widths": config.layer_widths}

    def check() -> None:
        require_own(output)
        if (output / "shear.json").exists():
            require_same_options(output, options)

    context.raise_on_any_rank(check if context.is_main else lambda: None)
    path = widths_path(config, inputs.target, _key(inputs))
    found = kept_selection(path, inputs.target, context)
    if found is None:
        texts = _texts(inputs)
        sizes = (inputs.target, inputs.source)
        known = path.with_suffix(".json")
        found = WidthSearch(_source(inputs, context), config, *sizes, *texts, context, known).best()
        keep_selection(path, found, context)
    return replace(inputs, selection=found)


def _key(inputs: Inputs) -> str:
    """Tells source, text and scores apart."""
    fingerprint = weights_fingerprint(inputs.folder)
    return measurements_key(inputs.config, fingerprint, inputs.reader.fingerprint)


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
