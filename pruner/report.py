"""The end of a shearing run: extraction, the saved model, its check, and the report."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from data.files import replace_folder
from data.log import logger
from data.paths import as_word, beside
from data.tables import print_table
from data.terminal import passing_over_what_is_not_shown
from pruner.config import ShearConfig
from pruner.extract import Extraction
from pruner.measurements import Measurements
from pruner.moments import save_moments
from pruner.proposal import measured_seconds
from pruner.repair import FOLDER, repair
from pruner.rules import Rule
from pruner.shapes import Shape, shape_of
from pruner.units import kept_indices, label, on_counts, polarised, span, to_masks
from trainer.config import TrainConfig
from trainer.loop import Trainer
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, save_tensors
from trainer.models.masks import Masks
from trainer.models.sources import weights_fingerprint
from trainer.models.weights import original_dtype
from trainer.run import training_report
from trainer.saving import full_tensors, publish, save_tensors_of
from trainer.verdict import (
    Stage,
    conclude,
    losses_of,
    measured_on,
    show,
    sizes_of,
    stages_of,
)

CHECK_TOKENS = 64
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1, "float16": 0.02}
"""Largest norm of the difference of logits, relative to their norm, between the masked model in
fp32 and the saved folder, by the type of the saved weights. A wrong extraction makes about 1;
rounding alone makes up to 1e-4 in fp32 where a model has outlier dimensions."""
UNCHECKED = "model.unchecked"
"""Name of the saved folder until it has passed the check."""
CONSTANTS = (
    "norm_eps",
    "rope_theta",
    "rope_scaling",
    "rotary_fraction",
    "head_dim",
    "activation",
    "parallel_residual",
)
"""Fields of the config that pruning never changes, and whose change may move logits little."""


def finish(
    trainer: Trainer,
    rule: Rule,
    config: ShearConfig,
    source: Path,
    target: Shape,
    measured: Measurements,
    reference: dict[str, float],
    told: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes model, masks and then the report, whose presence marks the run as finished.

    `measured` is what the source was measured to be, `reference` the losses that the mixture
    steered towards, `told` how the units were found where that was not here.

    Collective. Raises InputError when a folder cannot be written, RuntimeError
    when the saved model is not the masked one.
    """
    output, context = Path(config.output), trainer.context
    z = {name: values.cpu() for name, values in rule.final().items()}
    held = config.masks.norm_scale == "held"
    masks = to_masks(z, shape_of(trainer.model.config), hold_scale=held)
    extraction = Extraction(trainer.model.config, masks)
    _require_target(extraction.config, target, rule)
    difference = _save_checked(trainer, extraction, masks, config, source)
    refitted = _refitted(trainer, extraction, config, source, measured)
    report = {
        "source": str(source.absolute()),
        "source_weights": weights_fingerprint(source),
        "source_dtype": original_dtype(trainer.model.config.hf, source),
        "rule": config.masks.rule,
        "distillation": asdict(config.distillation),
        **_units(rule, z),
        **_sizes(trainer.model.config, extraction.config),
        **training_report(trainer),
        "reference": reference,
        "source_held_out": measured.held_out,
        **_before(trainer, source, measured, output),
        "basis": config.masks.basis,
        "reload_difference": difference,
        "selection": _selection(config) | {"in_doubt": measured.in_doubt} | dict(told or {}),
        "refit": refitted,
    }
    context.raise_first(_put_in_place(z, measured.rotation, output) if context.is_main else None)
    if config.saves_moments:
        save_moments(trainer, extraction, output)
    publish(context, report, config.json, output / "shear.json")
    if context.is_main:
        shutil.rmtree(output / FOLDER, ignore_errors=True)
        print_units(report)
        _show_verdict(report, config)
    if not report["polarised"]:
        _warn_unpolarised(report)
    logger.info(f"model: {output / 'model'}  report: {output / 'shear.json'}")
    return report


def _refitted(
    trainer: Trainer,
    extraction: Extraction,
    config: ShearConfig,
    source: Path,
    measured: Measurements,
) -> dict[str, Any] | None:
    """What the report says of the refit; None where there is none. Collective."""
    if not config.refits:
        return None
    return repair(
        trainer,
        extraction,
        config.refit,
        Path(config.output) / UNCHECKED,
        source=source,
        rotation=measured.rotation,
        dtype=getattr(torch, config.save_dtype),
    )


def _require_target(config: ModelConfig, target: Shape, rule: Rule) -> None:
    """AssertionError unless the model of `config` is what was asked for."""
    uneven = not target.even or any(kind.uneven for kind in rule.kinds.values())
    assert shape_of(config) == target, config
    assert uneven == (config.layer_sizes is not None), config


def _save_checked(
    trainer: Trainer, extraction: Extraction, masks: Masks, config: ShearConfig, source: Path
) -> float:
    """Writes the model that `masks` leave to OUTPUT/UNCHECKED; the difference of its logits from
    the masked model's. Collective; raises RuntimeError where that is too large."""
    context, path = trainer.context, Path(config.output) / UNCHECKED
    whole = full_tensors(trainer.model, needed=context.is_main)
    # Only rank 0 cuts and writes; the others take part in gathering.
    pairs = extraction.tensors(whole) if context.is_main else whole
    dtype = getattr(torch, config.save_dtype)
    save_tensors_of(pairs, extraction.config, context, path, source, dtype)
    require_same_constants(load_config(path), trainer.model.config)
    difference = reload_difference(trainer, masks, path)
    _require_same_function(difference, config)
    return difference


@torch.no_grad()
def reload_difference(trainer: Trainer, masks: Masks, path: Path) -> float:
    """Norm of the difference between the masked model's logits and those of the saved folder in
    plain transformers, relative to their norm, on the first tokens of the data; collective.

    Rank 0 gathers the masked model whole and compares in fp32 on the CPU: in the run's own bf16,
    rounding alone differs by several per cent and would hide an error.
    """
    tensors = {
        name: tensor if trainer.context.is_main else None
        for name, tensor in full_tensors(trainer.model, needed=trainer.context.is_main)
    }
    difference = None
    if trainer.context.is_main:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        with torch.device("meta"):
            masked = CausalLM(trainer.model.config)
        masked.load_state_dict(tensors, assign=True)
        reader = trainer.stream.reader
        length = min(CHECK_TOKENS, trainer.config.seq_len)
        ids = torch.from_numpy(reader.read(reader.domains[0], np.array([0])))[:, :length]
        expected = masked.eval()(ids, masks=masks)
        logging.disable_progress_bar()
        plain = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False
        ).eval()
        # A model of zeros gives zeros.
        norm = expected.norm().clamp_min(torch.finfo(torch.float32).tiny)
        difference = ((plain(ids).logits - expected).norm() / norm).item()
    return float(trainer.context.broadcast(difference))


def _require_same_function(difference: float, config: ShearConfig) -> None:
    limit = TOLERANCE[config.save_dtype]
    if not difference <= limit:
        raise RuntimeError(
            f"the saved model's logits differ from the masked model's by {difference:.2e} of "
            f"their norm (limit {limit:.0e}): do not use {config.output}/{UNCHECKED}"
        )


def require_same_constants(written: ModelConfig, source: ModelConfig) -> None:
    """Raises RuntimeError unless both configs have the same CONSTANTS."""
    for name in CONSTANTS:
        new, old = getattr(written, name), getattr(source, name)
        if new != old:
            raise RuntimeError(f"the saved config has {name}={new!r}, the source has {old!r}")


def _units(rule: Rule, z: dict[str, Tensor]) -> dict[str, Any]:
    """What each row of each kind keeps, and whether the kept units are fully on."""
    kept = {name: (values > 0).sum(-1) for name, values in z.items()}
    on = {name: on_counts(values) for name, values in z.items()}
    return {
        "families": {name: asdict(kind) for name, kind in rule.kinds.items()},
        "target": {
            name: kept[name].tolist() if kind.uneven else [kind.target] * kind.rows
            for name, kind in rule.kinds.items()
        },
        "kept": {name: counts.tolist() for name, counts in kept.items()},
        "alive": {name: counts.tolist() for name, counts in on.items()},
        "kept_not_alive": {name: int((kept[name] - on[name]).sum()) for name in z},
        "polarised": polarised(z, rule.kinds),
    }


def _selection(config: ShearConfig) -> dict[str, Any]:
    """How the kept units were found."""
    return {
        "from": config.selection,
        "init": None if config.selection else config.masks.init,
        "mask_steps": config.train.steps,
        "weights": "trained" if config.trains_weights else "frozen",
    }


def _sizes(source: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    return {
        "source_shape": shape_of(source).to_json(),
        "target_shape": shape_of(target).to_json(),
        "parameters": {
            "source": source.num_parameters(),
            "target": target.num_parameters(),
            "source_non_embedding": source.num_parameters(embeddings=False),
            "target_non_embedding": target.num_parameters(embeddings=False),
        },
    }


def _put_in_place(z: dict[str, Tensor], rotation: Tensor | None, output: Path) -> str | None:
    """Publishes the checked model and writes masks and rotation; returns what went wrong, if
    anything."""
    tensors = {f"z.{name}": values for name, values in z.items()}
    # Rows of different lengths are no tensor.
    even = {name: values for name, values in z.items() if len({*(values > 0).sum(-1).tolist()}) < 2}
    tensors |= {f"kept.{name}": kept_indices(values) for name, values in even.items()}
    if rotation is not None:
        tensors["basis"] = rotation.float()
    try:
        save_tensors(tensors, output / "masks.safetensors")
        replace_folder(output / UNCHECKED, output / "model")
    except (OSError, SafetensorError) as error:
        return f"--output {output} cannot be written ({error}); free space and run this again"
    return None


def _warn_unpolarised(report: dict[str, Any]) -> None:
    units = ", ".join(f"{label(name)} {count}" for name, count in report["kept_not_alive"].items())
    logger.warning(
        f"the masks did not polarise. Kept units that are not on (z < 0.99): {units}; their values "
        "are folded into the weights. More steps help, and --rule projection always polarises"
    )


def _before(trainer: Trainer, source: Path, measured: Measurements, output: Path) -> dict[str, Any]:
    """What the report says of the source, for whoever compares it with what comes after."""
    on = measured_on(trainer)
    losses = losses_of(measured.held_out)
    sizes = sizes_of(trainer.model.config)
    seconds = measured_seconds(output)
    stage = Stage("source", str(source.absolute()), losses, on, sizes, seconds.get("source"))
    return {
        "before": [stage.to_json()],
        "held_out_on": on,
        "seconds_per_token": seconds.get("target"),
    }


def _show_verdict(report: dict[str, Any], config: ShearConfig) -> None:
    output = Path(config.output)
    words = ["--model", as_word(output), "--data", as_word(config.data)]
    words += ["--output", as_word(beside(output, "-cpt"))]
    words += ["--seq-len", str(config.train.seq_len)]
    # Another seed draws samples that shearing has seen; other sequences can't be compared with.
    default = TrainConfig()
    for name in ("seed", "eval_sequences"):
        if getattr(config.train, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(config.train, name))]
    stages = stages_of(output)
    if stages:
        show(conclude(stages, report["weights"]), [shlex.join(["shorn", "cpt", *words])])


@passing_over_what_is_not_shown()
def print_units(report: dict[str, Any]) -> None:
    """Prints what was kept."""
    shapes = Table(title="kept units per row")
    for heading in ("units", "rows", "source", "target", "kept", "on"):
        shapes.add_column(heading, justify="left" if heading == "units" else "right")
    for name, kind in report["families"].items():
        shapes.add_row(
            label(name),
            str(kind["rows"]),
            str(kind["units"]),
            str(kind["target"]),
            span(report["kept"][name]),
            span(report["alive"][name]),
        )
    print_table(shapes)
