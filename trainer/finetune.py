"""Fine-tuning, from validated options to a Hugging Face folder, an adapter and a report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.hub import is_hub_id
from data.log import logger
from data.reader import TokenReader
from trainer import parallel
from trainer.adapters import FOLDER, merged_tensors, require_peft, write_adapter
from trainer.callbacks.dropout import DropoutCallback
from trainer.conclusion import conclude_training
from trainer.config import DistillationConfig, TrainConfig, check_layout
from trainer.cpt import SOURCE, find_model, require_one_teacher
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
    mixture_identity,
    replayed,
    resolve_mixture,
    sheared_report,
    start_reference,
    starting_domains,
)
from trainer.finetune_config import EPOCHS, FinetuneConfig
from trainer.finished import REPORTS
from trainer.identity import named, revisions, run_identity, verify_run
from trainer.inputs import find_model_with_data, open_data, warn_of_no_tokenizer
from trainer.loop import Callback, Trainer
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.export import require_loadable
from trainer.models.hf import check_weights, load_config, load_sharded
from trainer.models.lora import (
    Dropout,
    add_adapters,
    init_adapters,
    plain_view,
    targets_of,
    train_last_blocks,
)
from trainer.models.sources import local_folder, weights_fingerprint
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
    ParameterCounts,
    build_model,
    build_trainer,
    choose_kernels,
    count_parameters,
)
from trainer.saving import (
    final_dtype,
    log_finished,
    open_or_finished,
    require_copy,
    save_pretrained,
)
from trainer.throughput import partial_flops

REPORT = "finetune.json"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything the options name, opened and checked; no weights yet."""

    source: Path
    """The model's Hugging Face folder."""
    shape: ModelConfig
    reader: TokenReader
    held_out: TokenReader | None
    domains: Domains
    distillation: DistillationConfig
    teacher: TeacherSource | None
    """None when distillation is off."""
    note: str | None
    """What to say about the teacher."""
    targets: tuple[str, ...]
    """Modules that get an adapter; none where the method is another."""
    steps: int
    """Of the run."""
    epochs: float | None
    """That they come from; None where --steps says them."""


class Recipe:
    """How a model is changed so that what the method trains is trained."""

    def __init__(self, config: FinetuneConfig, targets: tuple[str, ...]) -> None:
        self.config = config
        self.targets = targets
        self.dropout = Dropout(config.lora.dropout, config.train.seed)

    def adapt(self, network: CausalLM) -> None:
        """Adds adapters, or freezes what is not trained."""
        config, lora = self.config, self.config.lora
        if config.method == "lora":
            options: dict[str, Any] = {"rank": lora.r, "scale": lora.scale}
            add_adapters(network, self.targets, **options, dropout=self.dropout)
        elif config.method == "last-blocks":
            train_last_blocks(network, config.last_blocks, head=config.head)

    def callbacks(self) -> list[Callback]:
        """What training needs besides."""
        drops = self.config.method == "lora" and self.dropout.rate
        return [DropoutCallback(self.dropout)] if drops else []

    def counts(self, shape: ModelConfig) -> ParameterCounts:
        """Parameters of a model of `shape` once it is adapted."""
        with torch.device("meta"):
            network = CausalLM(shape)
            self.adapt(network)
        return count_parameters(network)


def finetune(config: FinetuneConfig, *, tensorboard: bool = True) -> Trainer | None:
    """Trains as `config` says, writes OUTPUT/model, OUTPUT/adapter and OUTPUT/finetune.json;
    resumes what OUTPUT holds.

    Returns None when the run was finished before. Raises InputError before any weight is loaded,
    also when another process trains into OUTPUT.
    """
    train, output = config.train, Path(config.output)
    check_layout(train, parallel.world_size())
    context = parallel.init(replicas=train.replicas, threads=train.threads)
    kernels = choose_kernels(train.kernels, context)
    require_copy(context, config.json, output / REPORT)
    # A finished run writes no adapter any more.
    if config.method == "lora" and not (output / REPORT).exists():
        context.raise_on_any_rank(require_peft)

    def opened() -> Inputs:
        with context.rank_zero_first():
            return open_inputs(config)

    inputs = open_or_finished(
        opened,
        output / REPORT,
        train,
        context,
        names=named(model=config.model, data=config.data),
        copy=config.json,
        dtype=config.save_dtype,
        unknown=() if train.steps else ("steps",),
    )
    if inputs is None:
        return None
    config = replace(config, epochs=None, train=replace(train, steps=inputs.steps))
    require_one_teacher(inputs.teacher, inputs.note, context)
    with owned(output, REPORT, context):
        return _train(config, inputs, context, kernels, tensorboard)


def _train(
    config: FinetuneConfig,
    inputs: Inputs,
    context: DistributedContext,
    kernels: str,
    tensorboard: bool,
) -> Trainer | None:
    train, output, shape = config.train, Path(config.output), inputs.shape
    state = state_of(output, REPORT, context)
    identity = _identity(config, inputs, context)
    with _naming_epochs(inputs):
        verify_run(
            output,
            identity,
            context,
            started=state.started,
            resolve=lambda saved: resolve_mixture(saved, config.mixture),
        )
    if state.report is not None:
        _end_again(config, state.report, context)
        finish_removal(output, identity, context)
        return None
    recipe = Recipe(config, inputs.targets)
    counts = recipe.counts(shape)
    dtype = config.save_dtype or final_dtype(shape, inputs.source)
    # An adapter is written in fp32, which is twice the usual type of the model beside it.
    saved = shape.num_parameters() + 2 * counts.added
    require_room(output, counts.trained, train, context, saved=saved, dtype=dtype)
    logger.info(kernels)
    _log_notes(inputs, config, counts)
    trainer = _build(config, inputs, recipe, context, identity, state.resuming, tensorboard)
    trainer.throughput.recount(partial(partial_flops, trainer.model, train.seq_len))
    trainer.fit()
    if not trainer.stopping:
        note_removal(output, train, context)
        finish(trainer, inputs, config, dtype)
        remove_checkpoints(output, identity, train, context)
    return trainer


def _build(
    config: FinetuneConfig,
    inputs: Inputs,
    recipe: Recipe,
    context: DistributedContext,
    identity: dict[str, Any],
    resuming: bool,
    tensorboard: bool,
) -> Trainer:
    """Loads model and teacher, and puts them together with the data; restores the newest
    checkpoint, if there is one (`resuming`)."""
    train, shape = config.train, inputs.shape
    teacher = load_teacher(
        inputs.teacher,
        inputs.distillation,
        train,
        shape,
        context,
        frozen=config.method != "full",
    )
    model = build_model(
        shape, train, context, load=_loader(inputs.source, train), adapt=recipe.adapt
    )
    return build_trainer(
        model,
        train,
        context,
        output=Path(config.output),
        reader=inputs.reader,
        held_out=inputs.held_out,
        weights=inputs.domains.weights,
        reference=_reference(inputs, config, None if resuming else model, context),
        mixture=config.mixture,
        history=inputs.domains.history,
        identity=identity,
        teacher=teacher,
        callbacks=recipe.callbacks(),
        trained_only=True,
        description="finetune",
        tensorboard=tensorboard,
    )


def open_inputs(config: FinetuneConfig) -> Inputs:
    """Opens model folder, data and teacher and checks that they fit each other and the options.

    The weights of a hub id are fetched at the end.
    """
    train, mixture = config.train, config.mixture
    options = DomainOptions(config.domain_weights, config.reference_losses, config.reference_fit)
    source = find_model_with_data(
        lambda: find_model(config.model, weights=False),
        config.data,
        train.seq_len,
        local_folder(config.model if is_hub_id(config.model) else SOURCE),
    )
    shape = load_config(source)
    require_loadable(shape, source)
    targets = _check_method(config, shape)
    reader, held_out = open_data(config.data, train, shape, source, config.documents)
    warn_of_no_tokenizer(source)
    steps = train.steps or steps_of(config, reader)
    # Which domains are drawn is what shearing says only where it is to go on moving.
    dynamic = mixture.kind == "dynamic"
    domains = starting_domains(
        reader.sizes,
        options,
        parameters=shape.num_parameters(),
        sheared=sheared_report(run_of(source) / source.name) if dynamic else None,
        needs_reference=False,
        apart=dynamic and reader.documents == "apart",
    )
    domains = replayed(domains, mixture, options, reader, replace(train, steps=steps), {})
    name, distillation, note = resolve_teacher(config.teacher, config.distillation, None)
    teacher = open_teacher(name, distillation, train, shape, reader)
    models = {"--model": source} | ({} if teacher is None else {"--teacher": teacher.folder})
    require_apart(Path(config.output), models=models, data=Path(config.data))
    source = find_model(config.model)
    check_weights(source, shape)
    return Inputs(
        source=source,
        shape=shape,
        reader=reader,
        held_out=held_out,
        domains=domains,
        distillation=distillation,
        teacher=teacher,
        note=note,
        targets=targets,
        steps=steps,
        epochs=None if train.steps else _epochs(config),
    )


def _check_method(config: FinetuneConfig, shape: ModelConfig) -> tuple[str, ...]:
    """Modules that get an adapter. Raises InputError where the method does not fit the model."""
    if config.method == "lora":
        if config.lora.r > shape.hidden_size:
            raise InputError(
                f"--lora-r {config.lora.r}: no matrix in the blocks has a rank above the hidden "
                f"size, {shape.hidden_size}; use {shape.hidden_size} or less"
            )
        return targets_of(shape, config.lora.target_modules)
    if config.method == "last-blocks" and config.last_blocks > shape.num_layers:
        raise InputError(
            f"--last-blocks {config.last_blocks}: the model has {shape.num_layers} blocks; use "
            f"{shape.num_layers} or less, or --method full"
        )
    return ()


def _epochs(config: FinetuneConfig) -> float:
    return EPOCHS if config.epochs is None else config.epochs


def steps_of(config: FinetuneConfig, reader: TokenReader) -> int:
    """Steps that go through the training text as often as asked for, rounded up."""
    # As it was written: 0.1 is a tenth, and not a little more.
    samples = Fraction(str(_epochs(config))) * sum(reader.sizes.values())
    steps = -(-samples // config.train.global_batch)
    return int(steps)


def _loader(source: Path, train: TrainConfig) -> Callable[[CausalLM], None]:
    """Loads the weights of the folder `source`, and draws adapters if there are any."""

    def load(network: CausalLM) -> None:
        load_sharded(plain_view(network), source)
        init_adapters(network, train.seed)

    return load


@contextmanager
def _naming_epochs(inputs: Inputs) -> Iterator[None]:
    """Says of another number of steps that it comes from --epochs, where it does."""
    try:
        yield
    except InputError as error:
        if inputs.epochs is None or "--steps was" not in str(error):
            raise
        told = f"{error} (--epochs {inputs.epochs:g} takes {inputs.steps} steps)"
        raise InputError(told) from None


def _end_again(config: FinetuneConfig, report: Path, context: DistributedContext) -> None:
    """Says that the run of `report` is finished, and what is missing of what it left."""
    keep, adapter = config.train.checkpoints_left, report.parent / FOLDER
    log_finished(context, report, config.json, config.save_dtype, keep)
    if config.method == "lora" and not (adapter / "adapter_config.json").exists():
        logger.warning(
            f"{adapter} is gone: put it back from a copy, or name another --output to train again"
        )


def _log_notes(inputs: Inputs, config: FinetuneConfig, counts: ParameterCounts) -> None:
    train, whole = config.train, inputs.shape.num_parameters()
    beside = "beside the" if counts.added else "of the"
    logger.info(
        f"{config.method}: trains {counts.trained:,} parameters {beside} model's {whole:,} "
        f"({counts.trained / whole:.2%})"
    )
    samples = sum(inputs.reader.sizes.values())
    drawn = train.steps * train.global_batch
    logger.info(
        f"{train.steps:,} steps of {train.global_batch:,} sequences: {drawn / samples:.3g} epochs "
        f"of {samples:,} sequences"
    )
    tied = inputs.shape.tie_embeddings
    if config.method == "last-blocks" and config.head and tied:
        logger.info(
            "note: the head is the embedding too, which is therefore trained as well; --no-head "
            "leaves it as it is"
        )
    inputs.domains.log()
    run = run_of(inputs.source)
    again = max(drawn_again(run / name, inputs.reader, train.seed) for name in REPORTS)
    if again:
        logger.info(begins_anew(again, run))
    if train.eval_sequences and inputs.held_out is None:
        logger.info(f"note: {config.data} has no held-out sequences: nothing will be evaluated")


def _reference(
    inputs: Inputs, config: FinetuneConfig, model: CausalLM | None, context: DistributedContext
) -> dict[str, float]:
    """Known reference losses, or for a dynamic mixture those of the start model (`model`; None once
    training has begun)."""
    if inputs.domains.reference or config.mixture.kind != "dynamic":
        return inputs.domains.reference
    batch = config.train.micro_batch
    return start_reference(Path(config.output), model, inputs.reader, batch, context)


def _identity(
    config: FinetuneConfig, inputs: Inputs, context: DistributedContext
) -> dict[str, Any]:
    dynamic = config.mixture.kind == "dynamic"
    names: dict[str, tuple[str | None, Path]] = {"--model": (config.model, inputs.source)}
    if inputs.teacher is not None:
        names["--teacher"] = (config.teacher, inputs.teacher.folder)
    return run_identity(
        config.train,
        inputs.shape,
        precision=str(parallel.compute_dtype(config.train.precision, context.device)),
        data=inputs.reader.fingerprint,
        documents=inputs.reader.documents,
        command="finetune",
        initial_weights=weights_fingerprint(inputs.source),
        mixture=mixture_identity(config.mixture, inputs.domains, config.train.steps),
        domain_weights=inputs.domains.weights,
        reference_losses=inputs.domains.reference if dynamic else None,
        **config.identity(inputs.targets),
        **teacher_identity(inputs.distillation, inputs.teacher),
        **revisions(names),
        **named(model=config.model, data=config.data),
    )


def finish(trainer: Trainer, inputs: Inputs, config: FinetuneConfig, dtype: str) -> None:
    """Writes adapter, model folder and then the report, whose presence marks the run as
    finished."""
    output, model, context = Path(config.output), trainer.model, trainer.context
    if config.method == "lora":
        write_adapter(
            model,
            context,
            output / FOLDER,
            base=inputs.source,
            named=config.model,
            options=config.lora,
            targets=inputs.targets,
        )
        logger.info(f"adapter: {output / FOLDER}; {output / 'model'} has it merged")
    save_pretrained(
        model,
        context,
        output / "model",
        tokenizer_from=inputs.source,
        dtype=dtype,
        tensors=merged_tensors(model, needed=context.is_main),
        chat=inputs.reader.manifest.chat,
    )
    more = config.identity(inputs.targets)
    more["trained_parameters"] = count_parameters(model).trained
    conclude_training(
        trainer, output / REPORT, inputs.source, config.data, dtype, config.json, more
    )
