"""A shearing run, from validated options to the dense model and its report."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.log import logger
from data.reader import TokenReader
from pruner.budget import parse_budget
from pruner.callback import ShearCallback
from pruner.config import ShearConfig
from pruner.constraint import Rule, make_rule, require_reachable
from pruner.history import HistoryCallback
from pruner.importance import initial_scores
from pruner.measurements import (
    Measurements,
    keep,
    load_kept,
    measure_source,
    measurements_key,
)
from pruner.proposal import TARGET_FILE, settle_together
from pruner.report import finish
from pruner.rotation import basis_in_force, turn
from pruner.shapes import Shape, config_of, parse_sizes, parse_target, shape_of
from pruner.units import families
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.config import check_layout
from trainer.distillation import TeacherSource, check_teacher, load_teacher, teacher_identity
from trainer.domains import DomainOptions, Domains, starting_domains
from trainer.identity import claim_output, run_identity
from trainer.inputs import find_model_with_data, open_data
from trainer.loop import Trainer
from trainer.memory import room_bytes
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import check_weights, load_config
from trainer.models.sources import is_hub_id, local_folder, resolve_model, weights_fingerprint
from trainer.parallel import DistributedContext
from trainer.run import build_model, build_trainer, choose_kernels, pretrained
from trainer.saving import publish, require_copy, say_finished


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything the options name, opened and checked; no weights yet."""

    folder: Path
    """The source's Hugging Face folder."""
    model: ModelConfig
    source: Shape
    target: Shape
    reader: TokenReader
    held_out: TokenReader | None
    domains: Domains
    basis: str
    """The basis of the residual stream in force (pruner.rotation)."""


def shear(config: ShearConfig) -> Trainer | None:
    """Prunes as `config` says and writes OUTPUT/model, masks.safetensors and shear.json.

    Resumes what OUTPUT holds; returns None when that run is finished. Raises InputError before any
    weight is read for what cannot work.
    """
    check_layout(config.train, parallel.world_size())
    context = parallel.init(replicas=config.train.replicas, threads=config.train.threads)
    choose_kernels(config.train.kernels, context)
    json_copy = Path(config.json) if config.json else None
    require_copy(context, json_copy)
    config, proposal = _settle_target(config.in_force(), context)
    with context.rank_zero_first():
        inputs = open_inputs(config)
    output = Path(config.output)
    finished = context.broadcast((output / "shear.json").exists())
    resuming = Checkpointer(output / "checkpoints", context).latest() is not None
    fingerprint = weights_fingerprint(inputs.folder)
    identity = _identity(config, inputs, fingerprint, context)
    claim_output(output, identity, context, started=finished or resuming)
    if finished:
        say_finished(context, output / "shear.json", json_copy)
        return None
    if proposal is not None:
        publish(context, proposal, [output / TARGET_FILE])
    for message in inputs.domains.messages():
        logger.info(message)
    logger.info(f"source {inputs.source.describe()}  target {inputs.target.describe()}")
    source = _teacher(config, inputs)
    teacher = load_teacher(source, config.distillation, config.train, inputs.model, context)
    model = build_model(
        inputs.model, config.train, context, load=None if resuming else pretrained(inputs.folder)
    )
    measured = _measurements(config, inputs, context, fingerprint, None if resuming else model)
    reference = inputs.domains.reference or measured.reference
    trainer, rule = _assemble(config, inputs, model, context, measured, reference)
    trainer.teacher = teacher
    trainer.fit()
    if not trainer.stopping:
        finish(trainer, rule, config, inputs.folder, inputs.target, measured, reference)
    return trainer


def _settle_target(
    config: ShearConfig, context: DistributedContext
) -> tuple[ShearConfig, dict[str, Any] | None]:
    """`config` with the shape that a budget comes to, and what OUTPUT/target.json says of it.

    A target that names its shape stays as it is, and None. Data is opened first, so that nothing
    is measured for a run that cannot start.
    """
    budget = parse_budget(config.target)
    if budget is None:
        return config, None
    with context.rank_zero_first():
        folder, model = _find_source(config)
        open_data(config.data, config.train, model, folder)
    dtype = parallel.compute_dtype(config.train.precision, context.device)
    proposal = settle_together(budget, model, Path(config.output), context, dtype)
    return replace(config, target=proposal["shape"]), proposal


def open_inputs(config: ShearConfig) -> Inputs:
    """Opens source and data and checks that they fit each other and the target.

    The weights of a hub id are fetched only when everything else is right.
    """
    parse_sizes(config.target)
    options = DomainOptions(
        weights=config.domain_weights,
        reference=config.reference_losses,
        reference_fit=config.reference_fit,
    )
    folder, model = _find_source(config)
    source = shape_of(model)
    target = parse_target(config.target, source)
    pruned = config_of(target, model)
    pruned.to_hf()
    require_reachable(families(target, source), config.masks)
    basis = basis_in_force(config.masks, model, target)
    reader, held_out = open_data(config.data, config.train, model, folder)
    check_teacher("the source", model, config.distillation, config.train, model)
    domains = starting_domains(
        reader.sizes,
        options,
        parameters=pruned.num_parameters(),
        sheared=None,
        needs_reference=False,
    )
    folder = resolve_model(config.source, option="--source")
    check_weights(folder, model)
    return Inputs(folder, model, source, target, reader, held_out, domains, basis)


def _find_source(config: ShearConfig) -> tuple[Path, ModelConfig]:
    """The source's folder, where weights may still be missing, and its architecture."""
    name = config.source
    folder = find_model_with_data(
        lambda: resolve_model(name, weights=False, option="--source"),
        config.data,
        config.train.seq_len,
        local_folder(name) if is_hub_id(name) else name,
    )
    return folder, load_config(folder)


def _identity(
    config: ShearConfig, inputs: Inputs, fingerprint: str, context: DistributedContext
) -> dict[str, Any]:
    precision = parallel.compute_dtype(config.train.precision, context.device)
    scale = "held" if config.masks.holds_scale else "live"
    masks = asdict(config.masks) | {"basis": inputs.basis, "norm_scale": scale}
    return run_identity(
        config.train,
        inputs.model,
        precision=str(precision),
        data=inputs.reader.fingerprint,
        command="shear",
        source=fingerprint,
        target=inputs.target.describe(),
        mixture=asdict(config.mixture),
        domain_weights=inputs.domains.weights,
        reference_losses=inputs.domains.reference,
        **{f"masks.{name}": value for name, value in masks.items()},
        **teacher_identity(config.distillation, _teacher(config, inputs)),
    )


def _teacher(config: ShearConfig, inputs: Inputs) -> TeacherSource | None:
    """The untouched source; None when distillation is off."""
    return TeacherSource(inputs.folder, inputs.model) if config.distillation.weight else None


def _measurements(
    config: ShearConfig,
    inputs: Inputs,
    context: DistributedContext,
    fingerprint: str,
    model: CausalLM | None,
) -> Measurements:
    """Kept measurements of the source, or those of `model` while it still is the source, which is
    then turned to the basis in force."""
    output = Path(config.output)
    key = measurements_key(config, inputs.basis, fingerprint, inputs.reader.fingerprint)
    measured = load_kept(output, None if model is None else key, context)
    if measured is None:
        assert model is not None
        logger.info("measuring the source: held-out loss and importance of its units")
        data = (inputs.reader, inputs.held_out, inputs.domains.weights, inputs.basis)
        measured = measure_source(model, config, context, *data)
        keep(measured, output, key, context)
    elif model is not None and measured.basis is not None:
        turn(model, measured.basis)
    if measured.basis is not None:
        turned = int(((measured.basis != 0).sum(0) > 1).sum())
        logger.info(
            f"turned to principal components: {turned} of {inputs.source.hidden} dimensions",
        )
    for domain, values in measured.held_out.items():
        logger.info(f"source, held-out {domain}: loss {values['loss']:.4f}")
    return measured


def _assemble(
    config: ShearConfig,
    inputs: Inputs,
    model: CausalLM,
    context: DistributedContext,
    measured: Measurements,
    reference: dict[str, float],
) -> tuple[Trainer, Rule]:
    """The trainer with its newest checkpoint restored, and the rule that trains its masks."""
    members = families(inputs.target, inputs.source)
    seed = config.train.seed
    scores = initial_scores(members, config.masks, measured.importance, seed, context.device)
    rule = make_rule(members, scores, config.masks, config.train.steps, seed)
    teacher = inputs.model if config.distillation.weight else None
    room = room_bytes(inputs.model, config.train, context, teacher)
    shear_callback = ShearCallback(rule, inputs.source, room)
    trainer = build_trainer(
        model,
        config.train,
        context,
        output=Path(config.output),
        reader=inputs.reader,
        held_out=inputs.held_out,
        weights=inputs.domains.weights,
        reference=reference,
        mixture=config.mixture,
        callbacks=[shear_callback, HistoryCallback(shear_callback, Path(config.output))],
        description="shear",
    )
    return trainer, rule
