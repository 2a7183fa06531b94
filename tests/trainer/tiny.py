"""Small trainers for tests: every piece is the real one, only the sizes are tiny."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.mixture import MixtureConfig
from data.reader import TokenReader
from data.weight_history import WeightHistory
from trainer import parallel
from trainer.config import CptConfig, TrainConfig
from trainer.cpt import continue_pretraining
from trainer.loop import Callback, Trainer
from trainer.models.config import ModelConfig
from trainer.run import build_model, build_trainer, random_init
from trainer.saving import full_tensors

SHAPE = ModelConfig(
    family="llama",
    vocab_size=259,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=128,
    tie_embeddings=True,
)
REFERENCE = {"alpha": 2.0, "beta": 5.0}


def options(**changes: Any) -> TrainConfig:
    """A configuration of 20 quick steps."""
    quick: dict[str, Any] = {
        "steps": 20,
        "seq_len": 16,
        "global_batch": 8,
        "micro_batch": 2,
        "lr": 1e-2,
        "save_interval": 0,
        "eval_sequences": 4,
        "threads": 1,
    }
    return TrainConfig(**(quick | changes))


def make_trainer(
    workspace: Path,
    output: Path,
    config: TrainConfig | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    context: parallel.DistributedContext | None = None,
    mixture: MixtureConfig | None = None,
    history: WeightHistory | None = None,
) -> Trainer:
    """A trainer on the workspace's tokens with a dynamic mixture, restored from `output`."""
    config = config or options()
    context = context or parallel.init(replicas=config.replicas, threads=config.threads)
    reader = TokenReader(workspace / "tokens", config.seq_len)
    return build_trainer(
        build_model(SHAPE, config, context, load=random_init(config.seed)),
        config,
        context,
        output=output,
        reader=reader,
        held_out=TokenReader(workspace / "tokens", config.seq_len, split="held_out"),
        weights={"alpha": 0.5, "beta": 0.5},
        reference=REFERENCE,
        mixture=mixture or MixtureConfig(interval=3, strength=1.0),
        history=history,
        callbacks=callbacks,
        description="test",
        tensorboard=False,
    )


def pretrain(
    train: TrainConfig, *, model: Path, data: Path, output: Path, **options: Any
) -> Trainer | None:
    """Continued pre-training without TensorBoard."""
    config = CptConfig(train=train, model=str(model), data=str(data), output=str(output), **options)
    return continue_pretraining(config, tensorboard=False)


def losses(output: Path) -> list[float]:
    """Losses of metrics.jsonl in order of steps, each of which must appear once."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole parameters on the CPU; collective."""
    return dict(full_tensors(trainer.model))
