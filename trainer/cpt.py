"""Continued pre-training, from validated options to a Hugging Face folder and a report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import InputError, MissingInput
from data.hub import is_hub_id
from data.log import logger
from data.mixture import MixtureConfig
from data.paths import home_expanded, quoted
from data.reader import TokenReader
from trainer import parallel
from trainer.checkpoint_files import committed
from trainer.conclusion import conclude_training
from trainer.config import (
    MIN_LR_RATIO,
    WARMUP_RATIO,
    CptConfig,
    DistillationConfig,
    TrainConfig,
    check_layout,
)
from trainer.distillation import (
    TeacherSource,
    load_teacher,
    open_teacher,
    resolve_teacher,
    teacher_identity,
)
from trainer.domains import (
    DomainOptions,
    Domains,
    begins_anew,
    drawn_again,
    drawn_otherwise,
    mixture_identity,
    replayed,
    resolve_mixture,
    samples_used,
    sheared_report,
    start_reference,
    starting_domains,
)
from trainer.finished import REPORTS, report_of, without_model
from trainer.identity import moments_of, named, read_identity, revisions, run_identity, verify_run
from trainer.inputs import find_model_with_data, open_data, warn_of_no_tokenizer
from trainer.loop import Trainer
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.export import require_loadable
from trainer.models.hf import check_weights, load_config
from trainer.models.sources import (
    fetch_advice,
    local_folder,
    resolve_model,
    weights_fingerprint,
)
from trainer.moments import FILE as MOMENTS
from trainer.moments import Moments, find_moments, load_moments
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
from trainer.run import (
    build_model,
    build_trainer,
    choose_kernels,
    pretrained,
    random_init,
)
from trainer.saving import (
    final_dtype,
    log_finished,
    open_or_finished,
    require_copy,
    save_pretrained,
)

SOURCE = "meta-llama/Llama-2-7b-hf"
"""The model that messages propose to shear."""


@dataclass(frozen=True, slots=True)
class Taught:
    """By whom a model is taught, and how."""

    distillation: DistillationConfig
    teacher: TeacherSource | None
    """None when distillation is off."""
    noted: str | None
    """Fingerprint of the teacher of a finished run, which needs it no more; None for others."""
    note: str | None
    """What to say about it."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything the options name, opened and checked; no weights yet."""

    source: Path
    """The model's Hugging Face folder."""
    shape: ModelConfig
    reader: TokenReader
    held_out: TokenReader | None
    domains: Domains
    used: dict[str, int]
    """Samples of each domain that the shearing run has drawn, and that training passes over."""
    mixture: MixtureConfig
    """Fixed where the options ask for a dynamic one but no reference losses can be known; dynamic
    without any in `domains` means that the start model's are measured."""
    taught: Taught
    moments: Moments | None
    """What the optimizer starts with; None: nothing."""
    moments_note: str | None
    """What to say about them."""


def continue_pretraining(config: CptConfig, *, tensorboard: bool = True) -> Trainer | None:
    """Trains as `config` says, writes OUTPUT/model and OUTPUT/cpt.json; resumes what OUTPUT holds.

    Returns None when the run was finished before. Raises InputError before any weight is loaded,
    also when another process trains into OUTPUT.
    """
    train, output = config.train, Path(config.output)
    _check_steps(train)
    context = parallel.init(replicas=train.replicas, threads=train.threads)
    kernels = choose_kernels(train.kernels, context)
    require_copy(context, config.json, output / "cpt.json")

    def opened() -> Inputs:
        with context.rank_zero_first():
            return open_inputs(config)

    inputs = open_or_finished(
        opened,
        output / "cpt.json",
        train,
        context,
        names=named(model=config.model, data=config.data),
        copy=config.json,
        dtype=config.save_dtype,
    )
    if inputs is None:
        return None
    config = replace(config, train=_scheduled(train, inputs.moments))
    require_one_teacher(inputs.taught.teacher, inputs.taught.note, context)
    with owned(output, "cpt.json", context):
        return _train(config, inputs, context, kernels, tensorboard)


def _train(
    config: CptConfig,
    inputs: Inputs,
    context: DistributedContext,
    kernels: str,
    tensorboard: bool,
) -> Trainer | None:
    train, output = config.train, Path(config.output)
    state = state_of(output, "cpt.json", context)
    identity = _identity(config, inputs, context)
    verify_run(
        output,
        identity,
        context,
        started=state.started,
        resolve=lambda saved: resolve_mixture(saved, config.mixture),
    )
    if state.report is not None:
        keep = config.train.checkpoints_left
        log_finished(context, state.report, config.json, config.save_dtype, keep)
        finish_removal(output, identity, context)
        return None
    parameters, resuming = inputs.shape.num_parameters(), state.resuming
    dtype = config.save_dtype or final_dtype(inputs.shape, inputs.source)
    require_room(output, parameters, train, context, saved=parameters, dtype=dtype)
    logger.info(kernels)
    _log_notes(inputs, config)
    teacher = load_teacher(
        inputs.taught.teacher, inputs.taught.distillation, train, inputs.shape, context
    )
    fresh = config.init == "random"
    load = random_init(train.seed) if fresh else pretrained(inputs.source)
    model = build_model(inputs.shape, train, context, load=None if resuming else load)
    trainer = build_trainer(
        model,
        train,
        context,
        output=output,
        reader=inputs.reader,
        held_out=inputs.held_out,
        weights=inputs.domains.weights,
        reference=_reference(inputs, config, None if resuming else model, context),
        mixture=inputs.mixture,
        history=inputs.domains.history,
        used=inputs.used,
        identity=identity,
        teacher=teacher,
        description="cpt",
        tensorboard=tensorboard,
    )
    if inputs.moments is not None and not resuming:
        moments = inputs.moments
        context.raise_on_any_rank(lambda: load_moments(moments, model, trainer.optimizer))
    trainer.fit()
    if not trainer.stopping:
        note_removal(output, train, context)
        finish(trainer, inputs.source, config)
        remove_checkpoints(output, identity, train, context)
    return trainer


def open_inputs(config: CptConfig) -> Inputs:
    """Opens model folder, data and teacher and checks that they fit each other and the options.

    The weights of a hub id are fetched at the end, and only if training starts from them.
    """
    train, mixture, weights = config.train, config.mixture, config.init == "pretrained"
    options = DomainOptions(config.domain_weights, config.reference_losses, config.reference_fit)
    source = find_model_with_data(
        lambda: find_model(config.model, weights=False),
        config.data,
        train.seq_len,
        local_folder(config.model if is_hub_id(config.model) else SOURCE),
    )
    shape = load_config(source)
    require_loadable(shape, source)
    reader, held_out = open_data(config.data, train, shape, source, config.documents)
    warn_of_no_tokenizer(source)
    sheared = sheared_report(run_of(source) / source.name)
    # Only a model as it was pre-trained is its own reference: a sheared one starts too high.
    measurable = weights and sheared is None
    domains = starting_domains(
        reader.sizes,
        options,
        parameters=shape.num_parameters(),
        sheared=sheared,
        needs_reference=mixture.kind == "dynamic" and not measurable,
        apart=mixture.kind == "dynamic" and reader.documents == "apart",
    )
    if mixture.kind == "dynamic" and not domains.reference and not measurable:
        mixture = replace(mixture, kind="fixed")
    used = samples_used(sheared, reader, train.seed) if weights else {}
    domains = replayed(domains, mixture, options, reader, train, used)
    taught = _taught(config, sheared if weights else None, shape, reader)
    teacher = taught.teacher
    models = {"--model": source} | ({} if teacher is None else {"--teacher": teacher.folder})
    require_apart(Path(config.output), models=models, data=Path(config.data))
    moments, moments_note = None, None
    if weights:
        source = find_model(config.model)
        check_weights(source, shape)
        if config.moments:
            moments, moments_note = _moments(source, config)
    return Inputs(
        source=source,
        shape=shape,
        reader=reader,
        held_out=held_out,
        domains=domains,
        used=used,
        mixture=mixture,
        taught=taught,
        moments=moments,
        moments_note=moments_note,
    )


def _taught(
    config: CptConfig, sheared: dict[str, Any] | None, shape: ModelConfig, reader: TokenReader
) -> Taught:
    """Who teaches a model of `shape` that `sheared` is the report of."""
    noted = _noted_teacher(Path(config.output))
    finished = (Path(config.output) / "cpt.json").exists()
    name, distillation, note = resolve_teacher(
        config.teacher, config.distillation, sheared, noted=noted, finished=finished
    )
    # Of a finished run nothing is needed any more.
    gone = finished and name is None and noted == (sheared or {}).get("source_weights")
    if gone and distillation.weight:
        return Taught(distillation, None, noted, note)
    with _unnamed(config.teacher is None and name is not None):
        teacher = open_teacher(name, distillation, config.train, shape, reader)
    return Taught(distillation, teacher, None, note)


def _moments(source: Path, config: CptConfig) -> tuple[Moments | None, str | None]:
    """The moments that training starts or started with, and what to say about them."""
    run, output = run_of(source), Path(config.output)
    if (output / "cpt.json").exists() or committed(output / "checkpoints"):
        # A run that goes on has them in its checkpoints, or started without.
        steps = moments_of(output)
        return (Moments(run / MOMENTS, steps) if steps else None), None
    found, problem = find_moments(run, source, config.train.optimizer)
    if found is not None:
        return found, f"optimizer: goes on with its moments after {found.steps:,} steps of shearing"
    return None, problem and f"note: the optimizer starts with empty moments: {problem}"


def _scheduled(train: TrainConfig, moments: Moments | None) -> TrainConfig:
    """`train` with the schedule filled in; moments that are there need no warm-up."""
    ratio, warmup = train.min_lr_ratio, train.warmup_ratio
    if warmup is None:
        warmup = WARMUP_RATIO if moments is None else 0.0
    return replace(
        train, min_lr_ratio=MIN_LR_RATIO if ratio is None else ratio, warmup_ratio=warmup
    )


def _noted_teacher(output: Path) -> str | None:
    """Fingerprint of the teacher that the run in `output` began with; None without one."""
    try:
        noted = (read_identity(output) or {}).get("distill.teacher")
    except InputError:  # verify_run says so
        return None
    return noted if isinstance(noted, str) else None


@contextmanager
def _unnamed(unnamed: bool) -> Iterator[None]:
    """Says of an `unnamed` teacher, the source of a sheared model, how to do without."""
    try:
        yield
    except InputError as error:
        if not unnamed:
            raise
        raise InputError(
            f"{error}. It is the teacher because the model was cut from it: "
            "--distill-weight 0 trains without one"
        ) from None


def _check_steps(config: TrainConfig) -> None:
    if config.steps < 1:
        raise InputError(f"--steps {config.steps}: must be at least 1 to train; use for example 20")
    check_layout(config, parallel.world_size())


def require_one_teacher(
    teacher: TeacherSource | None, note: str | None, context: DistributedContext
) -> None:
    """Says who teaches (`note`). Raises InputError on every rank when some have no teacher."""
    if note is not None:
        logger.info(note)
    found = context.gather(teacher is not None)
    ranks = [rank for rank, own in enumerate(found) if own]
    if 0 < len(ranks) < len(found):
        raise InputError(
            f"the model to learn from is there on ranks {ranks} only: copy it to every "
            "machine, name another place with --teacher, or use --distill-weight 0"
        )


def _log_notes(inputs: Inputs, config: CptConfig) -> None:
    inputs.domains.log()
    if any(inputs.used.values()):
        total = sum(inputs.used.values())
        logger.info(f"data: goes on after the {total:,} samples that shearing has drawn")
    if inputs.moments_note is not None:
        logger.info(inputs.moments_note)
    if config.init == "pretrained":
        _log_origin(inputs, config)
    if config.train.eval_sequences and inputs.held_out is None:
        logger.info(f"note: {config.data} has no held-out sequences: nothing will be evaluated")


def _log_origin(inputs: Inputs, config: CptConfig) -> None:
    """Says which part of the model's history this run does not go on from."""
    run = run_of(inputs.source)
    seed = config.train.seed
    again = (drawn_again(run / name, inputs.reader, seed) for name in REPORTS)
    drawn = 0 if inputs.used else max(again)
    if drawn:
        logger.info(begins_anew(drawn, run))
    others = drawn_otherwise(sheared_report(run / inputs.source.name), inputs.reader)
    if others:
        logger.info(
            f"note: the data begins at its start: the {others:,} samples that shearing has drawn "
            "were of another --seq-len"
        )
    open_weight = inputs.taught.teacher is None and config.distillation.weight is None
    known = is_hub_id(config.model) or any((run / name).exists() for name in REPORTS)
    if open_weight and inputs.taught.note is None and not known:
        logger.info(
            f"note: no shear.json lies in {run}: {inputs.source.name} is trained as a model that "
            "was not sheared, without a teacher; if it was, put the shear.json of its run there"
        )


def _reference(
    inputs: Inputs, config: CptConfig, model: CausalLM | None, context: DistributedContext
) -> dict[str, float]:
    """Known reference losses, or for a dynamic mixture those of the start model (`model`; None once
    training has begun)."""
    if inputs.domains.reference or inputs.mixture.kind != "dynamic":
        return inputs.domains.reference
    batch = config.train.micro_batch
    return start_reference(Path(config.output), model, inputs.reader, batch, context)


def _identity(config: CptConfig, inputs: Inputs, context: DistributedContext) -> dict[str, Any]:
    fresh, taught = config.init == "random", inputs.taught
    dynamic = inputs.mixture.kind == "dynamic"
    names: dict[str, tuple[str | None, Path]] = {"--model": (config.model, inputs.source)}
    if inputs.taught.teacher is not None:
        names["--teacher"] = (config.teacher, inputs.taught.teacher.folder)
    return run_identity(
        config.train,
        inputs.shape,
        precision=str(parallel.compute_dtype(config.train.precision, context.device)),
        data=inputs.reader.fingerprint,
        documents=inputs.reader.documents,
        command="cpt",
        init=config.init,
        initial_weights=None if fresh else weights_fingerprint(inputs.source),
        mixture=mixture_identity(inputs.mixture, inputs.domains, config.train.steps),
        domain_weights=inputs.domains.weights,
        reference_losses=inputs.domains.reference if dynamic else None,
        **({} if inputs.moments is None else {"moments": inputs.moments.steps}),
        **teacher_identity(taught.distillation, taught.teacher, taught.noted),
        **revisions(names),
        **named(model=config.model, data=config.data),
    )


def find_model(model: str, *, weights: bool = True) -> Path:
    """Resolves --model; raises InputError telling how to make or fetch one that is missing."""
    path = Path(home_expanded(model, "--model"))
    run = run_of(path) if path.name == "model" or path.is_symlink() else path
    run = path if (path / "run.json").exists() else run
    if (run / "run.json").exists() and not (report_of(run) and path.exists()):
        raise MissingInput(f"--model {model}: is of {without_model(run)}")
    if not path.exists() and not is_hub_id(model):
        raise MissingInput(
            f"--model {model}: no such folder. Name a Hugging Face folder or hub id, or shear a "
            f"model first: {fetch_advice(SOURCE, '--source')} to\n    python -m "
            f"pruner.shear --source {local_folder(SOURCE)} --target 1.3b --output {quoted(run)}"
        )
    return resolve_model(model, weights=weights)


def finish(trainer: Trainer, source: Path, config: CptConfig) -> None:
    """Writes the model folder and then the report, whose presence marks the run as finished."""
    output = Path(config.output)
    save_pretrained(
        trainer.model,
        trainer.context,
        output / "model",
        tokenizer_from=source,
        dtype=config.save_dtype,
        chat=trainer.stream.reader.manifest.chat,
    )
    start = None if config.init == "random" else source
    dtype = config.save_dtype or final_dtype(trainer.model.config, source)
    conclude_training(trainer, output / "cpt.json", start, config.data, dtype, config.json)
