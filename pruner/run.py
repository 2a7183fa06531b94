"""A shearing run, from validated options to the dense model and its report."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.hub import is_hub_id
from data.log import logger
from data.progress import finishing
from data.reader import TokenReader
from pruner.budget import parse_budget
from pruner.callback import ShearCallback
from pruner.config import CALIBRATION, CALIBRATION_SEQUENCES, ShearConfig, resolve, resolve_identity
from pruner.history import HistoryCallback
from pruner.measurements import (
    Measurements,
    keep,
    load_kept,
    measure_source,
    measurements_key,
    note_kept_options,
    sequences_ahead,
)
from pruner.proposal import ALTERNATIVES, TARGET_FILE, resolve_together, settled
from pruner.report import finish
from pruner.rotation import rotate
from pruner.rules import Rule
from pruner.scores import initial_scores, make_rule
from pruner.selection import Selection, read_selection, selected
from pruner.shape_search import FOLDER, ShapeSearch
from pruner.shapes import Shape, config_of, parse_sizes, parse_target, shape_of
from pruner.sheared_llama import require_reachable
from pruner.units import label, unit_kinds
from trainer import parallel
from trainer.agreement import SAME_FILES, require_same
from trainer.config import check_layout
from trainer.distillation import (
    Teacher,
    TeacherSource,
    check_teacher,
    load_teacher,
    teacher_identity,
)
from trainer.domains import (
    DomainOptions,
    Domains,
    begins_anew,
    drawn_again,
    mixture_identity,
    replayed,
    resolve_mixture,
    starting_domains,
)
from trainer.identity import require_own, revisions, run_identity, verify_run
from trainer.inputs import find_model_with_data, open_data, warn_of_no_tokenizer
from trainer.loop import Trainer
from trainer.memory import headroom_bytes
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.export import require_loadable
from trainer.models.hf import check_weights, load_config
from trainer.models.sources import local_folder, resolve_model, weights_fingerprint
from trainer.moments import FILE as MOMENTS
from trainer.output import (
    finish_removal,
    note_removal,
    owned,
    remove_checkpoints,
    require_apart,
    require_room,
    run_of,
    state_of,
)
from trainer.parallel import DistributedContext
from trainer.run import build_model, build_trainer, choose_kernels, pretrained
from trainer.saving import log_finished, publish, require_copy


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything the options name, opened and checked; no weights yet."""

    config: ShearConfig
    """The options, resolved."""
    folder: Path
    """The source's Hugging Face folder."""
    model: ModelConfig
    source: Shape
    target: Shape
    reader: TokenReader
    held_out: TokenReader | None
    domains: Domains
    selection: Selection | None
    """Units that are kept without being measured; it may leave kinds open."""


def shear(config: ShearConfig) -> Trainer | None:
    """Prunes as `config` says and writes OUTPUT/model, masks.safetensors and shear.json.

    Resumes what OUTPUT holds; returns None when that run is finished. Raises InputError before any
    weight is read for what cannot work, also when another process trains into OUTPUT.
    """
    check_layout(config.train, parallel.world_size())
    context = parallel.init(replicas=config.train.replicas, threads=config.train.threads)
    kernels = choose_kernels(config.train.kernels, context)
    require_copy(context, config.json, Path(config.output) / "shear.json")
    config, selection = _resolve_selection(config, context)
    config, proposal = _resolve_target(config, context, kernels)
    with context.rank_zero_first():
        inputs = open_inputs(config, selection)
    require_same_inputs(inputs, context)
    with owned(Path(config.output), "shear.json", context):
        inputs, proposal = _searched(inputs, proposal, context)
        return prune(inputs, context, proposal, kernels)


def prune(
    inputs: Inputs, context: DistributedContext, proposal: dict[str, Any] | None, kernels: str
) -> Trainer | None:
    """Prunes as `inputs` say, into an output folder that is owned; as `shear`."""
    config, output = inputs.config, Path(inputs.config.output)
    state = state_of(output, "shear.json", context)
    fingerprint = weights_fingerprint(inputs.folder)
    identity = _identity(inputs, fingerprint, context)
    verify_run(
        output,
        identity,
        context,
        started=state.started,
        resolve=lambda saved: resolve_mixture(resolve_identity(saved), config.mixture),
    )
    if state.report is not None:
        keep = config.train.keep_last_checkpoint
        log_finished(context, state.report, config.json, config.save_dtype, keep)
        _note_missing_moments(config, output)
        finish_removal(output, identity, context)
        return None
    resuming = state.resuming
    pruned = config_of(inputs.target, inputs.model).num_parameters()
    require_room(
        output,
        inputs.model.num_parameters(),
        config.train,
        context,
        saved=pruned,
        dtype=config.save_dtype,
        frozen=not config.trains_weights,
        refitted=config.refits,
        moments=config.saves_moments,
    )
    if proposal is not None:
        publish(context, proposal, output / TARGET_FILE)
    else:
        logger.info(kernels)
    inputs.domains.log()
    _log_notes(inputs)
    logger.info(f"source {inputs.source.describe()}  target {inputs.target.describe()}")
    teacher = load_teacher(
        _teacher(inputs), config.distillation, config.train, inputs.model, context
    )
    load = None if resuming else pretrained(inputs.folder)
    model = build_model(
        inputs.model, config.train, context, load=load, frozen=not config.trains_weights
    )
    measured = _measurements(inputs, context, fingerprint, None if resuming else model)
    reference = inputs.domains.reference or measured.reference
    trainer, rule = _assemble(inputs, model, teacher, context, measured, reference, identity)
    trainer.fit()
    if not trainer.stopping:
        note_removal(output, config.train, context)
        told = inputs.selection.told if inputs.selection else None
        with finishing():
            finish(trainer, rule, config, inputs.folder, inputs.target, measured, reference, told)
        remove_checkpoints(output, identity, config.train, context)
    return trainer


def _resolve_selection(
    config: ShearConfig, context: DistributedContext
) -> tuple[ShearConfig, Selection | None]:
    """`config` with the shape and the basis of its selection, if it names one, and that selection;
    collective. Raises InputError on every rank where it cannot be used."""
    if config.selection is None:
        return config, None
    path = config.selection

    def read() -> Selection:
        folder = resolve_model(config.source, option="--source")
        model = load_config(folder)
        selection = read_selection(path, folder, model)
        if selection.shape == shape_of(model):
            raise InputError(
                f"--selection {path}: keeps all units of --source {config.source}; name a model "
                "that was cut from it"
            )
        return selection

    found = context.raise_on_any_rank(read if context.is_main else lambda: None)
    selection: Selection = context.broadcast(found)
    return selected(config, selection), selection


def _resolve_target(
    config: ShearConfig, context: DistributedContext, kernels: str
) -> tuple[ShearConfig, dict[str, Any] | None]:
    """`config` with the shape that a budget comes to, and what OUTPUT/target.json says of it.

    A target that names its shape stays as it is, and None. Data is opened first, so that nothing
    is measured for a run that cannot start; `kernels` says what measures.
    """
    budget = parse_budget(config.target)
    if budget is None:
        return config, None
    budget = replace(budget, align=config.align)
    with context.rank_zero_first():
        folder, model = find_source(config)
        open_data(config.data, config.train, model, folder)
    logger.info(kernels)
    dtype = parallel.compute_dtype(config.train.precision, context.device)
    proposal = resolve_together(
        budget, model, Path(config.output), context, dtype, search=config.propose == "search"
    )
    return replace(config, target=proposal["shape"]), proposal


def _searched(
    inputs: Inputs, proposal: dict[str, Any] | None, context: DistributedContext
) -> tuple[Inputs, dict[str, Any] | None]:
    """`inputs` with the best of the shapes that a `proposal` leaves open, and that proposal."""
    if proposal is None or ALTERNATIVES not in proposal:
        return inputs, proposal
    config, output = inputs.config, Path(inputs.config.output)
    context.raise_on_any_rank(lambda: require_own(output) if context.is_main else None)
    shapes = [parse_target(text, inputs.source) for text in proposal[ALTERNATIVES]]
    load = pretrained(inputs.folder)
    model = build_model(inputs.model, config.train, context, load=load, frozen=True).eval()
    weights = inputs.domains.weights
    calibrated = config.masks.calibration_sequences or CALIBRATION_SEQUENCES
    refitted = config.refit.refit_sequences + config.refit.refit_held_out
    key = measurements_key(config, weights_fingerprint(inputs.folder), inputs.reader.fingerprint)
    parts = [key, asdict(config.refit), config.masks.norm_scale]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = output / FOLDER / f"{digest[:16]}.json"
    calibration, ids = (
        sequences_ahead(config, inputs.reader, weights, number) for number in (calibrated, refitted)
    )
    found = ShapeSearch(model, config, calibration, ids, context, path).best(shapes)
    del model
    proposal = settled(proposal, found, inputs.model)
    with context.rank_zero_first():
        return open_inputs(replace(config, target=found["shape"])), proposal


def open_inputs(
    config: ShearConfig, selection: Selection | None = None, *, apart: bool = False
) -> Inputs:
    """Opens source and data and checks that they fit each other and the target, which may remove
    layers of blocks `apart` where a selection says which.

    The weights of a hub id are fetched only when everything else is right.
    """
    apart = apart or selection is not None
    parse_sizes(config.target, apart=apart)
    options = DomainOptions(
        weights=config.domain_weights,
        reference=config.reference_losses,
        reference_fit=config.reference_fit,
    )
    folder, model = find_source(config)
    source = shape_of(model)
    target = parse_target(config.target, source, apart=apart)
    pruned = config_of(target, model)
    require_loadable(pruned, folder)
    require_reachable(unit_kinds(target, source), config.masks)
    config = resolve(config, model, target)
    reader, held_out = open_data(config.data, config.train, model, folder)
    warn_of_no_tokenizer(folder)
    require_apart(Path(config.output), models={"--source": folder}, data=Path(config.data))
    check_teacher("the source", model, config.distillation, config.train, model)
    domains = starting_domains(
        reader.sizes,
        options,
        parameters=pruned.num_parameters(),
        sheared=None,
        needs_reference=False,
    )
    domains = replayed(domains, config.mixture, options, reader, config.train, {})
    folder = resolve_model(config.source, option="--source")
    check_weights(folder, model)
    return Inputs(config, folder, model, source, target, reader, held_out, domains, selection)


def require_same_inputs(inputs: Inputs, context: DistributedContext) -> None:
    """Raises InputError on every rank where the source or the data of some are others, before
    anything is measured on them together."""
    if context.world > 1:
        found = {
            "--source": weights_fingerprint(inputs.folder),
            "--data": inputs.reader.fingerprint,
            "--target": inputs.target.describe(),
        }
        require_same(found, context.gather, SAME_FILES)


def find_source(config: ShearConfig) -> tuple[Path, ModelConfig]:
    """The source's folder, where weights may still be missing, and its architecture."""
    name = config.source
    folder = find_model_with_data(
        lambda: resolve_model(name, weights=False, option="--source"),
        config.data,
        config.train.seq_len,
        local_folder(name) if is_hub_id(name) else name,
    )
    model = load_config(folder)
    if model.layer_sizes is not None:
        raise InputError(
            f"--source {name}: its blocks differ in size already, and only models of even blocks "
            "can be pruned; name the model that it was cut from"
        )
    return folder, model


def _identity(inputs: Inputs, fingerprint: str, context: DistributedContext) -> dict[str, Any]:
    config = inputs.config
    precision = parallel.compute_dtype(config.train.precision, context.device)
    masks = {f"masks.{name}": value for name, value in asdict(config.masks).items()}
    return run_identity(
        config.train,
        inputs.model,
        precision=str(precision),
        data=inputs.reader.fingerprint,
        command="shear",
        source=fingerprint,
        target=inputs.target.describe(),
        mixture=mixture_identity(config.mixture, inputs.domains, config.train.steps),
        domain_weights=inputs.domains.weights,
        reference_losses=inputs.domains.reference,
        **{name: value for name, value in masks.items() if name != CALIBRATION},
        **({"selection": inputs.selection.key} if inputs.selection else {}),
        **((inputs.selection.options if inputs.selection else None) or {}),
        **_refit_identity(config),
        **teacher_identity(config.distillation, _teacher(inputs)),
        **revisions({"--source": (config.source, inputs.folder)}),
    )


def _refit_identity(config: ShearConfig) -> dict[str, Any]:
    """What is noted of the refit; nothing where weights are trained, because then there is none."""
    if config.trains_weights:
        return {}
    noted = {f"refit.{name}": value for name, value in asdict(config.refit).items()}
    return noted if config.refits else {"refit.refit": False}


def _teacher(inputs: Inputs) -> TeacherSource | None:
    """The untouched source; None when distillation is off, or nothing is trained."""
    distilled = inputs.config.distillation.weight and inputs.config.train.steps
    return TeacherSource(inputs.folder, inputs.model) if distilled else None


def _measurements(
    inputs: Inputs, context: DistributedContext, fingerprint: str, model: CausalLM | None
) -> Measurements:
    """Kept measurements of the source, or those of `model` while it still is the source; `model` is
    rotated if its basis says so."""
    config, output = inputs.config, Path(inputs.config.output)
    key = measurements_key(config, fingerprint, inputs.reader.fingerprint, inputs.selection)
    measured = load_kept(output, None if model is None else key, context)
    if model is None and context.is_main:
        note_kept_options(output, config)
    if measured is None:
        assert model is not None
        logger.info(f"measuring the source: {_measured(inputs)}")
        data = (inputs.reader, inputs.held_out, inputs.domains.weights)
        kinds = unit_kinds(inputs.target, inputs.source)
        measured = measure_source(model, config, context, *data, kinds, inputs.selection)
        keep(measured, output, key, context, config)
    elif model is not None and measured.rotation is not None:
        rotate(model, measured.rotation)
    _log_doubt(measured, inputs)
    if measured.rotation is not None:
        rotated = int(((measured.rotation != 0).sum(0) > 1).sum())
        logger.info(
            f"rotated to principal components: {rotated} of {inputs.source.hidden} dimensions",
        )
    for domain, values in measured.held_out.items():
        logger.info(f"source, held-out {domain}: loss {values['loss']:.4f}")
    return measured


def _note_missing_moments(config: ShearConfig, output: Path) -> None:
    """Says that a finished run has left none, where they are asked for."""
    if config.saves_moments and not (output / MOMENTS).exists():
        logger.info(
            f"note: {output} holds no {MOMENTS}: the run ended without, and --save-moments changes "
            "nothing now; name another --output to have them"
        )


def _measured(inputs: Inputs) -> str:
    """What is measured of the source, in words."""
    config = inputs.config
    parts = ["loss on training text"]
    if inputs.held_out is not None and config.train.eval_sequences:
        parts.insert(0, "held-out loss")
    if not (inputs.selection and inputs.selection.complete):
        parts += ["principal components"] if config.masks.basis == "principal" else []
        parts += ["importance of its units"] if config.masks.init != "flat" else []
    return ", ".join(parts)


def _log_notes(inputs: Inputs) -> None:
    """Says what the run goes without, and which samples its source has seen."""
    config, run = inputs.config, run_of(inputs.folder)
    if config.train.eval_sequences and inputs.held_out is None:
        logger.info(f"note: {config.data} has no held-out sequences: nothing will be evaluated")
    reports = ("shear.json", "cpt.json")
    drawn = [drawn_again(run / name, inputs.reader, config.train.seed) for name in reports]
    if any(drawn):
        logger.info(begins_anew(max(drawn), run))


def _log_doubt(measured: Measurements, inputs: Inputs) -> None:
    """Says which units' importance is within the noise of the calibration text."""
    parts = []
    for name, kind in unit_kinds(inputs.target, inputs.source).items():
        count = (measured.in_doubt or {}).get(name, 0)
        if count:
            what = label(name).partition(" per ")[0]
            parts.append(f"{count:,} of {kind.rows * kind.units:,} {what}")
    if parts:
        number = inputs.config.masks.calibration_sequences
        logger.info(
            f"importance: on other text, other units would be among the strongest: "
            f"{', '.join(parts)} (--calibration-sequences, now {number})"
        )


def _assemble(
    inputs: Inputs,
    model: CausalLM,
    teacher: Teacher | None,
    context: DistributedContext,
    measured: Measurements,
    reference: dict[str, float],
    identity: dict[str, Any],
) -> tuple[Trainer, Rule]:
    """The trainer with its newest checkpoint restored, and the rule that trains its masks."""
    config, output = inputs.config, Path(inputs.config.output)
    train, seed = config.train, config.train.seed
    kinds = unit_kinds(inputs.target, inputs.source)
    scores = initial_scores(kinds, config.masks, measured.importance, seed, context.device)
    rule = make_rule(kinds, scores, config.masks, train.steps, seed)
    teacher_config = None if teacher is None else inputs.model
    frozen = not config.trains_weights
    headroom = headroom_bytes(inputs.model, train, context, teacher_config, frozen=frozen)
    shear_callback = ShearCallback(rule, inputs.source, headroom)
    trainer = build_trainer(
        model,
        train,
        context,
        output=output,
        reader=inputs.reader,
        held_out=inputs.held_out,
        weights=inputs.domains.weights,
        reference=reference,
        mixture=config.mixture,
        history=inputs.domains.history,
        identity=identity,
        teacher=teacher,
        callbacks=[shear_callback, HistoryCallback(shear_callback, output)],
        description="shear",
    )
    return trainer, rule
