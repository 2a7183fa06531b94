"""Assembly shared by every command that trains: checked inputs in, a trainer ready to fit out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.batches import BatchStream
from data.log import logger
from data.mixture import Mixture, MixtureConfig
from data.reader import TokenReader
from data.sampler import DomainSampler
from data.weight_history import WeightHistory
from trainer.callbacks.checkpoint import CheckpointCallback
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.guard import GuardCallback
from trainer.callbacks.metrics import MetricsCallback
from trainer.callbacks.mixture import MixtureCallback
from trainer.callbacks.progress import ProgressCallback
from trainer.checkpoint import Checkpointer
from trainer.config import TrainConfig
from trainer.distillation import Teacher
from trainer.evaluate import report as held_out_report
from trainer.kernels import registry, trial
from trainer.loop import Callback, Trainer
from trainer.memory import check_memory
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_sharded
from trainer.optimizer import build_optimizer
from trainer.parallel import DistributedContext, compute_dtype, shard
from trainer.throughput import Throughput


def choose_kernels(choice: registry.Kernels, context: DistributedContext) -> str:
    """Chooses what computes the operators from now on, the same on every rank, and tries it; what
    to say of it where work begins. Raises InputError where that cannot run on the ranks'
    devices."""
    running = trial.settle(choice, context.device, context.gather)
    return f"kernels: {trial.describe(running, context.device)}"


def build_model(
    model: ModelConfig,
    config: TrainConfig,
    context: DistributedContext,
    *,
    load: Callable[[CausalLM], None] | None,
    frozen: bool = False,
    adapt: Callable[[CausalLM], None] | None = None,
) -> CausalLM:
    """A sharded model on `context.device`, filled by `load`; None leaves that to a checkpoint.

    Weights of a `frozen` one need no gradients, so no optimizer trains them. `adapt` says which are
    trained, and may add parameters, before anything is sharded.

    Nothing is ever allocated whole: the model is made on the meta device, sharded, and only then
    given memory. Raises InputError before that when it cannot fit.
    """
    # What is adapted is known when it is made; before that the weights alone must fit.
    check_memory(model, config, context, frozen=frozen or adapt is not None)
    with torch.device("meta"):
        network = CausalLM(model).requires_grad_(not frozen)
        if adapt is not None:
            adapt(network)
    if adapt is not None:
        sizes = count_parameters(network)
        check_memory(model, config, context, trained=sizes.trained, added=sizes.added)
    if not frozen:
        _note_dropout(model)
    network.checkpoint_activations = config.activation_checkpointing
    shard(
        network,
        network.blocks,
        context.mesh,
        dtype=compute_dtype(config.precision, context.device),
        reshard_after_forward=config.reshard_after_forward,
    )
    network.to_empty(device=context.device)
    if load is not None:
        load(network)
    return network


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a model of which not all are trained."""

    trained: int
    added: int
    """Parameters beyond those of its config."""


def count_parameters(network: CausalLM) -> ParameterCounts:
    """Those of a model, sharded or not."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in network.parameters())
    return ParameterCounts(trained, whole - network.config.num_parameters())


def _note_dropout(model: ModelConfig) -> None:
    """Says of dropout that a model's config asks for: training here has none in the model."""
    asked = {
        name: value
        for name, value in model.hf.items()
        if name.endswith("dropout") and isinstance(value, float) and value > 0
    }
    if asked:
        named = ", ".join(f"{name} {value:g}" for name, value in asked.items())
        logger.info(f"note: {named} of the model's config: training leaves dropout out")


def pretrained(source: Path) -> Callable[[CausalLM], None]:
    """Loads the weights of the Hugging Face folder `source`."""
    return lambda network: load_sharded(network, source)


def random_init(seed: int) -> Callable[[CausalLM], None]:
    """Draws fresh weights, the same for every number of ranks."""
    return lambda network: init_weights(network, seed=seed)


def build_trainer(
    model: CausalLM,
    config: TrainConfig,
    context: DistributedContext,
    *,
    output: Path,
    reader: TokenReader,
    held_out: TokenReader | None,
    weights: dict[str, float],
    reference: dict[str, float],
    mixture: MixtureConfig,
    history: WeightHistory | None = None,
    used: Mapping[str, int] | None = None,
    identity: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
    callbacks: Sequence[Callback] = (),
    trained_only: bool = False,
    description: str,
    tensorboard: bool = True,
) -> Trainer:
    """Puts model, optimizer, data and callbacks together; restores the newest checkpoint, if any.

    `callbacks` run before the standard ones. `weights` are the initial domain weights; `reference`
    the losses a dynamic mixture steers towards; `history` the weights that a replayed one repeats;
    `used` samples of each domain are passed over; `identity` (trainer.identity) goes into the
    checkpoints. With `trained_only` these leave out frozen weights, which `model` has already.
    """
    sampler = DomainSampler(reader.sizes, weights, config.seed, reader.fingerprint)
    sampler.start_after(used or {})
    # Without steps no batch is drawn, so any number of ranks will do.
    size = config.global_batch if config.steps else context.world
    stream = BatchStream(reader, sampler, size, context.rank, context.world)
    steering = _steering(mixture, weights, reference, config, output, history)
    place, keep = output / "checkpoints", config.checkpoints_kept
    checkpointer = Checkpointer(
        place, context, keep=keep, identity=identity, trained_only=trained_only
    )
    # The order counts. First what the caller adds: it may set the masks that evaluation uses.
    listed: list[Callback] = [*callbacks, steering, *_evaluating(held_out, config)]
    # Metrics and progress show what those before them have recorded; checkpoints save them all.
    listed += [
        GuardCallback(checkpointer),
        MetricsCallback(output, interval=config.log_interval, tensorboard=tensorboard),
        ProgressCallback(description),
        CheckpointCallback(checkpointer, config.save_interval),
    ]
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, config),
        stream=stream,
        config=config,
        context=context,
        throughput=_throughput(model.config, config, context),
        callbacks=listed,
        teacher=teacher,
    )
    _restore_newest(trainer, checkpointer)
    return trainer


def _evaluating(held_out: TokenReader | None, config: TrainConfig) -> list[Callback]:
    """What measures held-out losses, where there is text."""
    if held_out is None:
        return []
    interval, sequences = config.eval_interval, config.eval_sequences
    return [EvaluateCallback(held_out, interval=interval, sequences=sequences)]


def _throughput(model: ModelConfig, config: TrainConfig, context: DistributedContext) -> Throughput:
    """What counts the tokens of all ranks."""
    return Throughput(model, seq_len=config.seq_len, device=context.device, world=context.world)


def _restore_newest(trainer: Trainer, checkpointer: Checkpointer) -> None:
    checkpointer.clean()
    latest = checkpointer.latest()
    if latest is not None:
        checkpointer.restore(trainer, latest)
        done = f"{trainer.step} of {trainer.config.steps} steps are done"
        logger.info(f"resuming from {latest}: {done}")


def _steering(
    mixture: MixtureConfig,
    weights: dict[str, float],
    reference: dict[str, float],
    config: TrainConfig,
    output: Path,
    history: WeightHistory | None,
) -> MixtureCallback:
    horizon = max(1, config.steps) * config.global_batch * config.seq_len
    steered = Mixture(mixture, weights, reference, horizon)
    return MixtureCallback(steered, config.steps, output, history)


def training_report(trainer: Trainer) -> dict[str, Any]:
    """What every finished run reports: losses, tokens, speed and the last domain weights."""
    training: dict[str, Any] = {
        "final_loss": trainer.loss if trainer.step else None,
        "held_out": {},
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "samples": trainer.stream.order(),
        **trainer.throughput.summary(),
    }
    for callback in trainer.callbacks:
        if isinstance(callback, EvaluateCallback):
            training["held_out"] = held_out_report(callback.results)
        if isinstance(callback, MixtureCallback):
            training["weights"] = dict(callback.mixture.weights)
    return training
