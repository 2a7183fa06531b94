"""Assembly shared by every command that trains: checked inputs in, a trainer ready to fit out."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.batches import BatchStream
from data.errors import InputError
from data.files import require_writable, write_json
from data.log import logger
from data.machine import available_cores
from data.manifest import FILE_NAME, HELD_OUT
from data.mixture import Mixture, MixtureConfig
from data.reader import TokenReader
from data.sampler import DomainSampler
from data.tokenizers import load_tokenizer
from trainer.callbacks.checkpoint import CheckpointCallback
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.guard import GuardCallback
from trainer.callbacks.metrics import MetricsCallback
from trainer.callbacks.mixture import MixtureCallback
from trainer.callbacks.progress import ProgressCallback
from trainer.checkpoint import Checkpointer
from trainer.config import TrainConfig
from trainer.evaluate import report as held_out_report
from trainer.kernels import registry
from trainer.loop import Callback, Trainer
from trainer.memory import check_memory
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_sharded, save_model
from trainer.models.sources import TOKENIZER_FILES
from trainer.optimizer import build_optimizer
from trainer.parallel import DistributedContext, compute_dtype, shard, whole
from trainer.throughput import Throughput

TEXT_FOLDER = "SlimPajama-627B"


def find_model_with_data(find: Callable[[], Path], data: str, seq_len: int, tokenizer: str) -> Path:
    """The model folder that `find` finds.

    Where that fails and there is no tokenized data in `data` either, one InputError says how to get
    both. `tokenizer` is the tokenizer to name then.
    """
    try:
        return find()
    except InputError as error:
        missing = missing_data(data, seq_len, tokenizer)
        if missing is None:
            raise
        raise InputError(f"model and data are both missing.\n1. {error}\n2. {missing}") from error


def missing_data(data: str, seq_len: int, tokenizer: Path | str) -> str | None:
    """How to make tokenized data in the folder `data`, or None where it is there."""
    if (Path(data) / FILE_NAME).is_file():
        return None
    return (
        f"--data {data}: no tokenized data there. Fetch text and tokenize it:\n"
        "    hf download cerebras/SlimPajama-627B --repo-type dataset --include 'train/chunk1/*' "
        f"--local-dir {TEXT_FOLDER}\n"
        f"    python -m data.tokenize --input '{TEXT_FOLDER}/train/**/*.jsonl.zst' "
        f"--tokenizer {tokenizer} --output {data} --seq-len {seq_len} "
        f"--workers {available_cores()}\n"
        "  (or give data.tokenize text of your own: .jsonl, .txt or .parquet)"
    )


def open_data(
    data: str, config: TrainConfig, model: ModelConfig, source: Path
) -> tuple[TokenReader, TokenReader | None]:
    """Opens the training split, and the held-out split unless it is too short or not asked for.

    Raises InputError when there is no tokenized data, when it cannot feed `model` at
    `config.seq_len`, or when the tokenizer in the model folder `source` is not the one that made
    it.
    """
    folder = Path(data)
    missing = missing_data(data, config.seq_len, source)
    if missing is not None:
        raise InputError(missing)
    if config.seq_len > model.max_position_embeddings:
        raise InputError(
            f"--seq-len {config.seq_len} is longer than the model's "
            f"{model.max_position_embeddings} positions; use --seq-len "
            f"{model.max_position_embeddings} or less"
        )
    reader = TokenReader(folder, config.seq_len)
    check_tokenizer(reader, model, source, data)
    longest = max(reader.manifest.tokens(HELD_OUT).values(), default=0)
    if not config.eval_sequences or longest < config.seq_len:
        return reader, None
    return reader, TokenReader(folder, config.seq_len, split=HELD_OUT)


def check_tokenizer(reader: TokenReader, model: ModelConfig, source: Path, data: str) -> None:
    """Raises InputError when the tokens of `reader` are not those of the model in `source`."""
    used = reader.manifest.tokenizer
    if used.vocab_size > model.vocab_size:
        raise InputError(
            f"--data {data} was tokenized with {used.vocab_size} ids, the model has "
            f"{model.vocab_size}; tokenize again with --tokenizer {source}"
        )
    if not any((source / name).exists() for name in TOKENIZER_FILES):
        return
    if load_tokenizer(source).probe() != used.probe:
        raise InputError(
            f"--data {data} was tokenized by another tokenizer than the model's: the same text "
            f"gives other ids; tokenize again with --tokenizer {source}"
        )


def choose_kernels(choice: registry.Choice, context: DistributedContext) -> None:
    """Chooses what computes the operators from now on, and says it. Raises InputError where that
    cannot run on the ranks' devices."""
    running = registry.choose(choice, context.device)
    logger.info("kernels: " + ", ".join(f"{name} {by}" for name, by in running.items()))


def build_model(
    model: ModelConfig,
    config: TrainConfig,
    context: DistributedContext,
    *,
    load: Callable[[CausalLM], None] | None,
) -> CausalLM:
    """A sharded model on `context.device`, filled by `load`; None leaves that to a checkpoint.

    Nothing is ever allocated whole: the model is made on the meta device, sharded, and only then
    given memory. Raises InputError before that when it cannot fit.
    """
    check_memory(model, config, context)
    with torch.device("meta"):
        network = CausalLM(model)
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
    used: Mapping[str, int] | None = None,
    callbacks: Sequence[Callback] = (),
    description: str,
    tensorboard: bool = True,
) -> Trainer:
    """Puts model, optimizer, data and callbacks together; restores the newest checkpoint, if any.

    `callbacks` run before the standard ones. `weights` are the initial domain weights; `reference`
    the losses a dynamic mixture steers towards; `used` samples of each domain are passed over.
    """
    sampler = DomainSampler(reader.sizes, weights, config.seed, reader.fingerprint)
    sampler.start_after(used or {})
    stream = BatchStream(reader, sampler, config.global_batch, context.rank, context.world)
    horizon = max(1, config.steps) * config.global_batch * config.seq_len
    checkpointer = Checkpointer(output / "checkpoints", context, keep=config.keep_checkpoints)
    listed: list[Callback] = [
        *callbacks,
        MixtureCallback(Mixture(mixture, weights, reference, horizon), mixture.interval),
    ]
    if held_out is not None:
        listed.append(
            EvaluateCallback(
                held_out, interval=config.eval_interval, sequences=config.eval_sequences
            )
        )
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
        throughput=Throughput(
            model.config, seq_len=config.seq_len, device=context.device, world=context.world
        ),
        callbacks=listed,
    )
    checkpointer.clean()
    latest = checkpointer.latest()
    if latest is not None:
        checkpointer.restore(trainer, latest)
        logger.info(f"resuming from {latest}: {trainer.step} of {config.steps} steps are done")
    return trainer


def full_tensors(model: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor on the CPU), gathered one at a time; every rank must exhaust it."""
    for name, parameter in model.named_parameters():
        yield name, whole(parameter.detach()).cpu()


def save_pretrained(
    model: CausalLM, context: DistributedContext, path: Path, *, tokenizer_from: Path
) -> None:
    """Writes `path` as a Hugging Face folder, in the source's dtype (bf16 when it states none).

    All ranks take part.
    """
    stated = model.config.hf.get("dtype") or model.config.hf.get("torch_dtype")
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(str(stated), torch.bfloat16)
    save_tensors_of(full_tensors(model), model.config, context, path, tokenizer_from, dtype)


def save_tensors_of(
    tensors: Iterator[tuple[str, torch.Tensor]],
    config: ModelConfig,
    context: DistributedContext,
    path: Path,
    tokenizer_from: Path,
    dtype: torch.dtype,
) -> None:
    """Writes `tensors`, whose gathering is collective, from rank 0.

    Raises InputError on every rank when they cannot be written.
    """
    problem = None
    if context.is_main:
        try:
            save_model(config, tensors, path, tokenizer_from, dtype)
        except InputError as error:
            problem = str(error)
    # Every rank goes through all tensors, also rank 0 after a failure.
    for _ in tensors:
        pass
    context.check(problem)


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


def publish(context: DistributedContext, report: dict[str, Any], paths: Sequence[Path]) -> None:
    """Writes a report to all `paths` from rank 0. Raises InputError on every rank."""
    problem = None
    if context.is_main:
        try:
            for path in paths:
                write_json(path, report)
        except OSError as error:
            problem = f"cannot write {path}: {error.strerror}; free space or choose another file"
    context.check(problem)


def require_copy(context: DistributedContext, path: Path | None) -> None:
    """Raises InputError on every rank when rank 0 could not write the report's copy (--json)."""
    if path is not None:
        context.together(lambda: require_writable(path, "--json") if context.is_main else None)


def say_finished(context: DistributedContext, report: Path, copy: Path | None) -> None:
    """Says that the run of `report` is finished, and copies the report to `copy` (--json)."""
    logger.info(f"{report.parent}: this run is finished; its report is {report}")
    if copy is not None:
        publish(context, json.loads(report.read_text(encoding="utf-8")), [copy])
