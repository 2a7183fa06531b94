"""A shearing run, from validated options to the dense model and its report."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.given import has_option
from data.log import logger
from data.progress import finishing
from pruner.budget import parse_budget
from pruner.callback import ShearCallback
from pruner.config import CALIBRATION, ShearConfig, resolve_identity
from pruner.history import HistoryCallback
from pruner.inputs import Inputs, find_source, open_inputs, require_same_inputs
from pruner.measurements import (
    Measurements,
    keep,
    load_kept,
    measure_source,
    measurements_key,
    note_kept_options,
)
from pruner.projection import Chosen
from pruner.proposal import TARGET_FILE, resolve_together
from pruner.report import finish
from pruner.rotation import rotate
from pruner.rules import Rule
from pruner.scores import initial_scores, make_rule
from pruner.searches import with_shape, with_widths
from pruner.selection import Selection, read_selection, selected
from pruner.shapes import config_of, shape_of
from pruner.units import label
from trainer import parallel
from trainer.config import check_layout
from trainer.distillation import (
    Teacher,
    TeacherSource,
    load_teacher,
    teacher_identity,
)
from trainer.domains import (
    begins_anew,
    drawn_again,
    mixture_identity,
    resolve_mixture,
)
from trainer.finished import REPORTS
from trainer.identity import named, revisions, run_identity, verify_run
from trainer.inputs import open_data
from trainer.loop import Trainer
from trainer.memory import headroom_bytes
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config
from trainer.models.sources import resolve_model, weights_fingerprint
from trainer.moments import FILE as MOMENTS
from trainer.output import (
    finish_removal,
    note_removal,
    owned,
    remove_checkpoints,
    require_room,
    run_of,
    state_of,
)
from trainer.parallel import DistributedContext
from trainer.run import build_model, build_trainer, choose_kernels, pretrained
from trainer.saving import log_finished, open_or_finished, publish, require_copy


def shear(config: ShearConfig) -> Trainer | None:
    """Prunes as `config` says and writes OUTPUT/model, masks.safetensors and shear.json.

    Resumes what OUTPUT holds; returns None when that run is finished. Raises InputError before any
    weight is read for what cannot work, also when another process trains into OUTPUT.
    """
    check_layout(config.train, parallel.world_size())
    context = parallel.init(replicas=config.train.replicas, threads=config.train.threads)
    kernels = choose_kernels(config.train.kernels, context)
    require_copy(context, config.json, Path(config.output) / "shear.json")
    report, train = Path(config.output) / "shear.json", config.train
    opened = open_or_finished(
        lambda: _opened(config, context, kernels),
        report,
        train,
        context,
        names=named(source=config.source, data=config.data),
        copy=config.json,
        dtype=config.save_dtype,
    )
    if opened is None:
        return None
    inputs, proposal = opened
    config = inputs.config
    require_same_inputs(inputs, context)
    with owned(Path(config.output), "shear.json", context):
        if context.broadcast(not report.exists()):
            # Before hours of searching.
            require_room_for(inputs, context)
        inputs, proposal = with_shape(inputs, proposal, context)
        return prune(with_widths(inputs, context), context, proposal, kernels)


def _opened(
    config: ShearConfig, context: DistributedContext, kernels: str
) -> tuple[Inputs, dict[str, Any] | None]:
    """What the options name, and what a budget came to."""
    config, selection = _resolve_selection(config, context)
    config, proposal = _resolve_target(config, context, kernels)
    with context.rank_zero_first():
        return open_inputs(config, selection), proposal


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
        _note_moments(config, output)
        finish_removal(output, identity, context)
        return None
    resuming = state.resuming
    require_room_for(inputs, context)
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
    measured = _measurements(inputs, context, None if resuming else model)
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


def require_room_for(inputs: Inputs, context: DistributedContext) -> None:
    """Raises InputError on every rank where the disk has no room for what the run writes."""
    config = inputs.config
    require_room(
        Path(config.output),
        inputs.model.num_parameters(),
        config.train,
        context,
        saved=config_of(inputs.target, inputs.model).num_parameters(),
        dtype=config.save_dtype,
        frozen=not config.trains_weights,
        refitted=config.refits,
        moments=config.saves_moments,
    )


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
        layer_widths=config.layer_widths,
        **({"selection": inputs.selection.key} if inputs.selection else {}),
        **((inputs.selection.options if inputs.selection else None) or {}),
        **_refit_identity(config),
        **teacher_identity(config.distillation, _teacher(inputs)),
        **revisions({"--source": (config.source, inputs.folder)}),
        **named(source=config.source, data=config.data),
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
    inputs: Inputs, context: DistributedContext, model: CausalLM | None
) -> Measurements:
    """Kept measurements of the source, or those of `model` while it still is the source; `model` is
    rotated if its basis says so."""
    config, output = inputs.config, Path(inputs.config.output)
    key = measurements_key(config, inputs.source_key, inputs.reader.fingerprint, inputs.selection)
    measured = load_kept(output, None if model is None else key, context)
    if model is None and context.is_main:
        note_kept_options(output, config)
    if measured is None:
        assert model is not None
        logger.info(f"measuring the source: {_measured(inputs)}")
        data = (inputs.reader, inputs.held_out, inputs.domains.weights)
        kinds = inputs.kinds
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


def _note_moments(config: ShearConfig, output: Path) -> None:
    """Says that a finished run has left none where they are asked for, or some where they are
    not."""
    there = (output / MOMENTS).exists()
    if config.saves_moments and not there:
        logger.info(
            f"note: {output} holds no {MOMENTS}: the run ended without, and --save-moments changes "
            "nothing now; name another --output to have them"
        )
    if there and not config.save_moments:
        logger.info(
            f"note: --no-save-moments changes nothing now: {output / MOMENTS} is there, and can be "
            "deleted where training is not to go on with it"
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
    drawn = [drawn_again(run / name, inputs.reader, config.train.seed) for name in REPORTS]
    if any(drawn):
        logger.info(begins_anew(max(drawn), run))


def _log_doubt(measured: Measurements, inputs: Inputs) -> None:
    """Says which units' importance is within the noise of the calibration text."""
    parts = []
    for name, kind in inputs.kinds.items():
        count = (measured.in_doubt or {}).get(name, 0)
        if count:
            what = label(name).partition(" per ")[0]
            parts.append(f"{count:,} of {kind.rows * kind.units:,} {what}")
    if parts:
        held = sum(inputs.reader.sizes.values())
        number = min(inputs.config.masks.calibration_sequences or held, held)
        flags = ("--calibration-sequences", "--sequences") if number < held else ()
        more = next((f"; {flag} takes more" for flag in flags if has_option(flag)), "")
        logger.info(
            f"importance: on other text, other units would be among the strongest: "
            f"{', '.join(parts)} (measured on {number} sequences{more})"
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
    kinds = inputs.kinds
    scores = initial_scores(kinds, config.masks, measured.importance, seed, context.device)
    rule = make_rule(kinds, scores, config.masks, train.steps, seed)
    if inputs.selection and inputs.selection.complete:
        rule = Chosen(kinds, scores, config.masks, train.steps, seed, units=inputs.selection.z)
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
