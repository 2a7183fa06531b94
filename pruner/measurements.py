"""What is measured on the source before it is trained: held-out losses, the principal components of
its residual stream, and importance.

All are kept in the output folder, because after the first step the source is gone and a resumed
run must start from the same numbers.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.batches import BatchStream
from data.errors import InputError
from data.log import logger
from data.reader import TokenReader
from data.records import fits, parse_json
from data.sampler import DomainSampler
from pruner.config import CALIBRATION_SEQUENCES, ShearConfig
from pruner.importance import in_doubt, measure
from pruner.rotation import measure_rotation, rotate
from pruner.second_order import second_order
from pruner.selection import Selection
from pruner.units import UnitKind
from trainer.domains import measured_reference
from trainer.evaluate import evaluate, report
from trainer.models.decoder import CausalLM
from trainer.models.hf import save_tensors
from trainer.parallel import DistributedContext, reshard

FILE = "source.safetensors"
ROTATION = "basis"
"""Name of the rotation among the stored tensors."""
_KINDS = {"held_out": dict, "reference": dict, "importance": bool}
"""The metadata besides the key, and what it is."""
_LOSSES = {"*": {"loss": (float, type(None)), "perplexity": (float, type(None)), "tokens": int}}


@dataclass(frozen=True, slots=True)
class Measurements:
    """The source model, measured."""

    held_out: dict[str, dict[str, float]]
    """{domain: {loss, perplexity, tokens}} on held-out text; empty when there is none."""
    reference: dict[str, float]
    """Loss per domain on training text: what a dynamic mixture compares training losses with."""
    importance: dict[str, Tensor] | None
    """[rows, units] of each kind (pruner.importance.measure), of hidden dimensions after the
    rotation; None for flat initial scores."""
    rotation: Tensor | None = None
    """[d, d] fp64: what rotates the residual stream before it is pruned (pruner.rotation); None: it
    stays as it is."""
    in_doubt: dict[str, int] | None = None
    """Units of each kind that the most important ones are told from by the calibration text's
    chance (pruner.importance.in_doubt)."""


def measurements_key(
    config: ShearConfig, source: str, data: str, selection: Selection | None = None
) -> str:
    """Hash of everything the measurements depend on.

    `config` is resolved; `source` and `data` tell models and tokens apart.
    """
    train, masks = config.train, config.masks
    parts = [source, data, train.seq_len, train.eval_sequences, train.precision]
    parts += [masks.init, masks.calibration_sequences, config.domain_weights]
    parts += [config.reference_sequences, masks.basis, config.target, train.seed]
    if selection is not None:
        parts.append(selection.key)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_kept(output: Path, key: str | None, context: DistributedContext) -> Measurements | None:
    """The measurements kept in `output` under `key`; None where there are none.

    `key` is None once training has begun: then those that the run started from are taken, because
    options that may change on resume enter it. Raises InputError when they are lost.
    """
    path = output / FILE
    kept: Measurements | None = context.broadcast(_read(path, key) if context.is_main else None)
    if kept is None and key is None:
        raise InputError(
            f"{path} (the measurements of the untrained source) is missing or damaged, and "
            f"training has begun: restore the file, or delete {output} to start over"
        )
    return kept


def keep(
    measurements: Measurements,
    output: Path,
    key: str,
    context: DistributedContext,
    config: ShearConfig,
) -> None:
    """Writes the measurements for `load_kept`; collective. Raises InputError when it cannot."""
    options = _options(config)
    context.raise_first(
        _write(output / FILE, key, measurements, options) if context.is_main else None
    )


def note_kept_options(output: Path, config: ShearConfig) -> None:
    """Says which options change nothing any more, because they decided the kept measurements."""
    if not (output / FILE).is_file():
        return
    try:
        with safe_open(output / FILE, framework="pt") as stored:
            text = (stored.metadata() or {}).get("options", "{}")
        kept = parse_json(text, f"{output / FILE}, options", "")
    except (OSError, InputError, SafetensorError):
        return
    for name, value in _options(config).items():
        if name in kept and kept[name] != value:
            flag = "--" + name.replace("_", "-")
            logger.info(
                f"note: {flag} {value}: the source was measured with {kept[name]} when this run "
                "began, and is not measured again"
            )


def _options(config: ShearConfig) -> dict[str, int | None]:
    """Options that may change on resume though they decide what is measured."""
    return {
        "calibration_sequences": config.masks.calibration_sequences,
        "reference_sequences": config.reference_sequences,
        "eval_sequences": config.train.eval_sequences,
    }


def measure_source(
    model: CausalLM,
    config: ShearConfig,
    context: DistributedContext,
    reader: TokenReader,
    held_out: TokenReader | None,
    weights: dict[str, float],
    kinds: dict[str, UnitKind],
    selection: Selection | None = None,
) -> Measurements:
    """Measures a loaded source, and rotates it to its principal components on the way if
    `config.masks.basis` says so; collective.

    `weights` are the initial domain weights, `config` is resolved, `kinds` are pruned. A
    `selection` takes the place of importance and, if it is complete, of components.
    """
    batch = config.train.micro_batch
    losses = {}
    if held_out is not None:
        count = config.train.eval_sequences
        data = (held_out, held_out.domains, count, batch, context)
        losses = report(evaluate(model, *data, description="measure on held-out text"))
    reference = measured_reference(model, reader, config.reference_sequences, batch, context)
    if selection is not None and selection.complete:
        if selection.rotation is not None:
            rotate(model, selection.rotation)
        return Measurements(losses, reference, selection.z, selection.rotation)
    masks = config.masks
    number = masks.calibration_sequences or CALIBRATION_SEQUENCES
    sequences = sequences_ahead(config, reader, weights, number)
    rotation = None
    if masks.basis == "principal":
        rotation = measure_rotation(model, sequences, context, batch)
        rotate(model, rotation)
    if masks.init is None or masks.init == "flat":
        return Measurements(losses, reference, None, rotation)
    if masks.init == "second-order":
        found = second_order(model, sequences, context, batch)
    else:
        found = measure(masks.init, model, sequences, context, batch)
    reshard(model)
    importance = {name: values[0] for name, values in found.items()}
    _require_finite(importance)
    decided = selection.z if selection else {}
    open_kinds = {name: kind for name, kind in kinds.items() if name not in decided}
    doubt = in_doubt(found, open_kinds)
    return Measurements(losses, reference, importance | decided, rotation, doubt)


def sequences_ahead(
    config: ShearConfig, reader: TokenReader, weights: dict[str, float], number: int
) -> torch.Tensor:
    """As many sequences [n, S] of what the run trains on first, in the mixture's own proportions;
    `weights` are the initial domain weights."""
    sampler = DomainSampler(reader.sizes, weights, config.train.seed, reader.fingerprint)
    return torch.from_numpy(BatchStream(reader, sampler, 1).ahead(number))


def _require_finite(importance: dict[str, Tensor]) -> None:
    for name, values in importance.items():
        rows = torch.nonzero(~values.isfinite().all(-1)).flatten().tolist()
        if rows:
            raise InputError(
                f"the importance of {name} row {rows[0]} is not finite: the source's weights are "
                "damaged, or --precision does not suit it; use --precision fp32"
            )


def _read(path: Path, key: str | None) -> Measurements | None:
    """The measurements in `path`, unless they are kept under another key than `key`."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if "key" not in metadata or key not in (None, metadata["key"]):
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    try:
        held_out, reference, importance = (
            parse_json(metadata.get(name, ""), f"{path}, {name}", "", kind=kind)
            for name, kind in _KINDS.items()
        )
        doubt = parse_json(metadata.get("in_doubt", "{}"), f"{path}, in_doubt", "", kind=dict)
    except InputError:
        return None
    finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    if not finite or not fits(held_out, _LOSSES) or not fits(reference, {"*": float}):
        return None
    if not fits(doubt, {"*": int}):
        return None
    rotation = tensors.pop(ROTATION, None)
    return Measurements(held_out, reference, tensors if importance else None, rotation, doubt)


def _write(
    path: Path, key: str, measurements: Measurements, options: dict[str, int | None]
) -> str | None:
    metadata = {
        "key": key,
        "options": json.dumps(options),
        "held_out": json.dumps(measurements.held_out),
        "reference": json.dumps(measurements.reference),
        "importance": json.dumps(measurements.importance is not None),
        "in_doubt": json.dumps(measurements.in_doubt or {}),
    }
    tensors = dict(measurements.importance or {"none": torch.zeros(0)})
    if measurements.rotation is not None:
        tensors[ROTATION] = measurements.rotation
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        return f"--output {path.parent} cannot be written ({error}); choose another folder"
    return None
