"""A shearing run, from validated options to the dense model and its report."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.reader import TokenReader
from pruner.callback import ShearCallback
from pruner.config import ShearConfig
from pruner.constraint import Rule, make_rule
from pruner.importance import initial_scores
from pruner.masks import families
from pruner.measurements import Measurements, load_or_measure, measure_source, measurements_key
from pruner.report import finish
from pruner.shapes import Shape, config_of, parse_sizes, parse_target, shape_of
from trainer import parallel
from trainer.checkpoint import Checkpointer
from trainer.config import check_layout
from trainer.domains import DomainOptions, Domains, starting_domains
from trainer.identity import claim_output, run_identity, weights_fingerprint
from trainer.loop import Trainer
from trainer.models.config import ModelConfig
from trainer.models.hf import load_config, resolve_model
from trainer.models.llama import CausalLM
from trainer.models.sources import is_hub_id, local_folder
from trainer.parallel import DistributedContext
from trainer.run import (
    build_model,
    build_trainer,
    find_model_with_data,
    open_data,
    pretrained,
    say,
    say_finished,
)


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


def shear(config: ShearConfig) -> Trainer | None:
    """Prunes as `config` says and writes OUTPUT/model, masks.safetensors and shear.json.

    Resumes what OUTPUT holds; returns None when that run is finished. Raises InputError before any
    weight is read for what cannot work.
    """
    check_layout(config.train, parallel.world_size())
    context = parallel.init(replicas=config.train.replicas, threads=config.train.threads)
    with context.rank_zero_first():
        inputs = open_inputs(config)
    output = Path(config.output)
    finished = context.broadcast((output / "shear.json").exists())
    resuming = Checkpointer(output / "checkpoints", context).latest() is not None
    fingerprint = weights_fingerprint(inputs.folder)
    identity = _identity(config, inputs, fingerprint, context)
    claim_output(output, identity, context, started=finished or resuming)
    if finished:
        say_finished(context, output / "shear.json", Path(config.json) if config.json else None)
        return None
    for message in inputs.domains.messages():
        say(context, message)
    say(context, f"source {inputs.source.describe()}  target {inputs.target.describe()}")
    model = build_model(
        inputs.model, config.train, context, load=None if resuming else pretrained(inputs.folder)
    )
    measured = _measurements(config, inputs, context, fingerprint, None if resuming else model)
    reference = inputs.domains.reference or measured.reference
    trainer, rule = _assemble(config, inputs, model, context, measured, reference)
    trainer.fit()
    if not trainer.stopping:
        finish(trainer, rule, config, inputs.folder, inputs.target, measured.held_out, reference)
    return trainer


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
    name = config.source
    folder = find_model_with_data(
        lambda: resolve_model(name, weights=False, option="--source"),
        config.data,
        config.train.seq_len,
        local_folder(name) if is_hub_id(name) else name,
    )
    model = load_config(folder)
    source = shape_of(model)
    target = parse_target(config.target, source)
    pruned = config_of(target, model)
    pruned.to_hf()
    reader, held_out = open_data(config.data, config.train, model, folder)
    domains = starting_domains(
        reader.sizes,
        options,
        parameters=pruned.num_parameters(),
        sheared=None,
        needs_reference=False,
    )
    folder = resolve_model(name, option="--source")
    return Inputs(folder, model, source, target, reader, held_out, domains)


def _identity(
    config: ShearConfig, inputs: Inputs, fingerprint: str, context: DistributedContext
) -> dict[str, Any]:
    precision = parallel.compute_dtype(config.train.precision, context.device)
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
        **{f"masks.{name}": value for name, value in asdict(config.masks).items()},
    )


def _measurements(
    config: ShearConfig,
    inputs: Inputs,
    context: DistributedContext,
    fingerprint: str,
    model: CausalLM | None,
) -> Measurements:
    """Kept measurements of the source, or those of `model` while it still is the source."""
    compute = None
    if model is not None:
        say(context, "measuring the source: held-out loss and importance of its units")
        data = (inputs.reader, inputs.held_out, inputs.domains.weights)
        compute = partial(measure_source, model, config, context, *data)
    key = measurements_key(config, fingerprint, inputs.reader.fingerprint)
    measured = load_or_measure(Path(config.output), key, context, compute)
    for domain, values in measured.held_out.items():
        say(context, f"source, held-out {domain}: loss {values['loss']:.4f}")
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
        callbacks=[ShearCallback(rule, inputs.source)],
        description="shear",
    )
    return trainer, rule
