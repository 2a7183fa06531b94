"""Continued pre-training, from validated options to a Hugging Face folder and a report."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data.errors import InputError
from data.mixture import MixtureConfig
from data.reader import TokenReader
from trainer import parallel
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.mixture import MixtureCallback
from trainer.checkpoint import Checkpointer
from trainer.config import TrainConfig, check_layout
from trainer.domains import Domains, sheared_report, starting_domains
from trainer.evaluate import report as held_out_report
from trainer.identity import claim_output, run_identity, weights_fingerprint
from trainer.loop import Trainer
from trainer.models.config import ModelConfig
from trainer.models.hf import load_config, resolve_model
from trainer.parallel import DistributedContext
from trainer.run import (
    build_model,
    build_trainer,
    open_data,
    pretrained,
    random_init,
    save_pretrained,
    say,
    write_report,
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything the options name, opened and checked; no weights yet."""

    source: Path
    """The model's Hugging Face folder."""
    shape: ModelConfig
    reader: TokenReader
    held_out: TokenReader | None
    domains: Domains
    mixture: MixtureConfig
    """Fixed where the options ask for a dynamic one but no reference losses are known."""


def continue_pretraining(
    config: TrainConfig,
    *,
    model: str,
    data: str,
    output: Path,
    init: Literal["pretrained", "random"] = "pretrained",
    mixture: MixtureConfig | None = None,
    domain_weights: str | None = None,
    reference_losses: str | None = None,
    json_copy: Path | None = None,
    tensorboard: bool = True,
) -> Trainer | None:
    """Trains `model` on `data`, writes OUTPUT/model and OUTPUT/cpt.json; resumes what OUTPUT holds.

    Returns None when the run was finished before. Raises InputError before loading weights for
    anything that cannot work.
    """
    check_layout(config, parallel.world_size())
    inputs = open_inputs(
        config, model, data, mixture or MixtureConfig(), domain_weights, reference_losses
    )
    context = parallel.init(replicas=config.replicas, threads=config.threads)
    finished = context.broadcast((output / "cpt.json").exists())
    resuming = Checkpointer(output / "checkpoints", context).latest() is not None
    identity = _identity(config, inputs, init, context)
    claim_output(output, identity, context, started=finished or resuming)
    if finished:
        say(context, f"{output}: this run is finished; its report is {output / 'cpt.json'}")
        return None
    for note in inputs.domains.notes:
        say(context, f"note: {note}")
    if config.eval_sequences and inputs.held_out is None:
        say(context, f"note: {data} has no held-out sequences: nothing will be evaluated")
    load = pretrained(inputs.source) if init == "pretrained" else random_init(config.seed)
    trainer = build_trainer(
        build_model(inputs.shape, config, context, load=None if resuming else load),
        config,
        context,
        output=output,
        reader=inputs.reader,
        held_out=inputs.held_out,
        weights=inputs.domains.weights,
        reference=inputs.domains.reference,
        mixture=inputs.mixture,
        description="cpt",
        tensorboard=tensorboard,
    )
    trainer.fit()
    if not trainer.stopping:
        finish(trainer, inputs.source, output, json_copy)
    return trainer


def open_inputs(
    config: TrainConfig,
    model: str,
    data: str,
    mixture: MixtureConfig,
    domain_weights: str | None,
    reference_losses: str | None,
) -> Inputs:
    """Opens model folder and data and checks that they fit each other and the options."""
    source = find_model(model)
    shape = load_config(source)
    reader, held_out = open_data(data, config, shape, source)
    domains = starting_domains(
        reader.sizes,
        weights=domain_weights,
        reference=reference_losses,
        sheared=sheared_report(source),
        dynamic=mixture.kind == "dynamic",
    )
    if not domains.reference:
        mixture = replace(mixture, kind="fixed")
    return Inputs(source, shape, reader, held_out, domains, mixture)


def _identity(
    config: TrainConfig, inputs: Inputs, init: str, context: DistributedContext
) -> dict[str, Any]:
    pretrained_weights = weights_fingerprint(inputs.source) if init == "pretrained" else None
    dynamic = inputs.mixture.kind == "dynamic"
    return run_identity(
        config,
        inputs.shape,
        precision=str(parallel.compute_dtype(config.precision, context.device)),
        data=inputs.reader.fingerprint,
        command="cpt",
        init=init,
        initial_weights=pretrained_weights,
        mixture=asdict(inputs.mixture),
        domain_weights=inputs.domains.weights,
        reference_losses=inputs.domains.reference if dynamic else None,
    )


def find_model(model: str) -> Path:
    """Resolves --model; raises InputError telling how to make or fetch one that is missing."""
    path = Path(model)
    how = (
        "python -m pruner.shear --source meta-llama/Llama-2-7b-hf --target 1.3b --data runs/tokens "
        f"--output {model}"
    )
    if path.is_dir() and (path / "run.json").exists() and not (path / "model").exists():
        raise InputError(f"--model {model}: that run has not finished; resume it, e.g. {how}")
    local = (
        path.is_absolute()
        or model.startswith(".")
        or (path.parent != Path() and path.parent.exists())
    )
    if not path.exists() and (local or model == "runs/shear" or model.count("/") != 1):
        raise InputError(
            f"--model {model}: no such folder. Shear a model first: {how} "
            "(or name a Hugging Face folder or hub id)"
        )
    return resolve_model(model)


def finish(trainer: Trainer, source: Path, output: Path, json_copy: Path | None) -> None:
    """Writes the model folder and then the report, whose presence marks the run as finished."""
    save_pretrained(trainer.model, trainer.context, output / "model", tokenizer_from=source)
    report: dict[str, Any] = {
        "final_loss": trainer.loss,
        "held_out": {},
        "steps": trainer.step,
        "tokens": trainer.tokens,
        **trainer.throughput.summary(),
    }
    for callback in trainer.callbacks:
        if isinstance(callback, EvaluateCallback):
            report["held_out"] = held_out_report(callback.results)
        if isinstance(callback, MixtureCallback):
            report["weights"] = dict(callback.mixture.weights)
    if trainer.context.is_main:
        write_report(output / "cpt.json", report)
        if json_copy is not None:
            write_report(json_copy, report)
    trainer.context.barrier()
    say(
        trainer.context,
        f"final loss {trainer.loss:.4f} after {trainer.tokens:,} tokens "
        f"({report['tokens_per_second']:,.0f} tokens/s): {output / 'model'}",
    )
