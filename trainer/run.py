"""Assembly shared by every command that trains: checked inputs in, a trainer ready to fit out."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data.batches import BatchStream
from data.errors import InputError
from data.manifest import FILE_NAME, HELD_OUT
from data.mixture import Mixture, MixtureConfig
from data.reader import TokenReader
from data.sampler import DomainSampler
from data.tokenizers import load_tokenizer
from trainer.callbacks.base import Callback
from trainer.callbacks.checkpoint import CheckpointCallback
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.callbacks.guard import GuardCallback
from trainer.callbacks.metrics import MetricsCallback
from trainer.callbacks.mixture import MixtureCallback
from trainer.callbacks.progress import ProgressCallback
from trainer.checkpoint import Checkpointer
from trainer.config import TrainConfig
from trainer.loop import Trainer
from trainer.models.config import ModelConfig
from trainer.models.hf import init_weights, load_sharded, save_model
from trainer.models.llama import CausalLM
from trainer.optimizer import build_optimizer
from trainer.parallel import DistributedContext, compute_dtype, shard
from trainer.throughput import Throughput

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def open_data(
    data: str, config: TrainConfig, model: ModelConfig, source: Path
) -> tuple[TokenReader, TokenReader | None]:
    """Opens the training split, and the held-out split unless it is too short or not asked for.

    Raises InputError when there is no tokenized data, when it cannot feed `model` at
    `config.seq_len`, or when the tokenizer in the model folder `source` is not the one that made
    it.
    """
    folder = Path(data)
    if not (folder / FILE_NAME).is_file():
        raise InputError(
            f"--data {data}: no tokenized data there. Make it with: python -m data.tokenize "
            f"--input 'SlimPajama-627B/train/**/*.jsonl.zst' --tokenizer {source} --output {data} "
            f"--seq-len {config.seq_len}"
        )
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


def build_model(
    model: ModelConfig,
    config: TrainConfig,
    context: DistributedContext,
    *,
    load: Callable[[CausalLM], None] | None,
) -> CausalLM:
    """A sharded model on `context.device`, filled by `load`; None leaves that to a checkpoint.

    Nothing is ever allocated whole: the model is made on the meta device, sharded, and only then
    given memory.
    """
    with torch.device("meta"):
        network = CausalLM(model)
    network.checkpoint_activations = config.activation_checkpointing
    shard(
        network,
        list(network.model.layers),
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
    callbacks: Sequence[Callback] = (),
    description: str,
    tensorboard: bool = True,
) -> Trainer:
    """Puts model, optimizer, data and callbacks together; restores the newest checkpoint, if any.

    `callbacks` run before the standard ones. `weights` are the initial domain weights; `reference`
    the losses a dynamic mixture steers towards.
    """
    sampler = DomainSampler(reader.sizes, weights, config.seed, reader.fingerprint)
    stream = BatchStream(reader, sampler, config.global_batch, context.rank, context.world)
    horizon = config.steps * config.global_batch * config.seq_len
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
        say(context, f"resuming from {latest}: {trainer.step} of {config.steps} steps are done")
    return trainer


def full_tensors(model: CausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole fp32 tensor on the CPU), gathered one at a time; every rank must exhaust it."""
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        yield name, (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


def save_pretrained(
    model: CausalLM, context: DistributedContext, path: Path, *, tokenizer_from: Path
) -> None:
    """Writes `path` as a Hugging Face folder, in the source's dtype (bf16 when it states none).

    All ranks take part.
    """
    stated = model.config.hf.get("dtype") or model.config.hf.get("torch_dtype")
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(str(stated), torch.bfloat16)
    tensors = full_tensors(model)
    if context.is_main:
        save_model(model.config, tensors, path, tokenizer_from, dtype)
    else:
        for _ in tensors:
            pass
    context.barrier()


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes a JSON report so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def say(context: DistributedContext, text: str) -> None:
    """Prints one line on rank 0."""
    if context.is_main:
        print(text, flush=True)
