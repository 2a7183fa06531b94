"""Gradients of the loop against a single process that sees the whole batch at once."""

import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.batches import Batch
from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.tiny import SHAPE, losses, make_trainer, options
from trainer import parallel
from trainer.config import TrainConfig
from trainer.loop import Callback, Trainer
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.hf import init_weights
from trainer.models.masks import Masks
from trainer.optimizer import build_optimizer
from trainer.run import build_model, random_init
from trainer.throughput import Throughput

ROWS, LENGTH, SEED = 16, 12, 3
Gradients = dict[str, np.ndarray]


class RaggedStream:
    """One global batch whose rows differ widely in the number of tokens that count."""

    domains: ClassVar[list[str]] = ["alpha", "beta"]

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        share = ROWS // world
        self._mine = slice(rank * share, (rank + 1) * share)

    def next(self) -> Batch:
        generator = np.random.default_rng(SEED)
        ids = generator.integers(0, SHAPE.vocab_size, (ROWS, LENGTH))
        kept = generator.integers(0, LENGTH + 1, ROWS)
        kept[:4] = 0
        valid = np.arange(LENGTH)[None, :] < kept[:, None]
        domains = np.arange(ROWS) % 2
        mine = self._mine
        return Batch(ids=ids[mine], domains=domains[mine], step=0, valid=valid[mine])


class Capture(Callback):
    """Sets masks that require gradients and keeps all gradients of a step, before clipping."""

    name: ClassVar[str] = "capture"

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_step_start(self, trainer: Trainer) -> None:
        trainer.masks = make_masks()

    def after_backward(self, trainer: Trainer) -> None:
        assert trainer.masks is not None
        for name, z in trainer.masks.tensors().items():
            assert z.grad is not None
            self.gradients[f"mask.{name}"] = trainer.context.all_reduce_sum(z.grad).numpy()
        for name, parameter in trainer.model.named_parameters():
            gradient: Any = parameter.grad
            self.gradients[name] = parallel.full_tensor(gradient).numpy()


def make_masks() -> Masks:
    generator = torch.Generator().manual_seed(SEED)

    def mask(*shape: int) -> torch.Tensor:
        return (0.2 + 0.8 * torch.rand(*shape, generator=generator)).requires_grad_()

    layers, heads = SHAPE.num_layers, SHAPE.num_heads
    return Masks(
        hidden=mask(SHAPE.hidden_size),
        layer=mask(layers),
        head=mask(layers, heads),
        intermediate=mask(layers, SHAPE.intermediate_size),
    )


def single_process_gradients() -> tuple[Gradients, float]:
    """Mean cross-entropy over the whole batch's valid targets, through full logits."""
    model = CausalLM(SHAPE)
    init_weights(model, seed=SEED)
    batch = RaggedStream().next()
    masks = make_masks()
    ids = torch.from_numpy(batch.ids)
    targets, valid = next_token_targets(ids, batch.valid)
    logits = model(ids, masks=masks)
    loss = F.cross_entropy(logits[valid], targets[valid])
    loss.backward()
    gradients = {
        f"mask.{n}": z.grad.numpy() for n, z in masks.tensors().items() if z.grad is not None
    }
    gradients |= {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, loss.item()


def ragged_trainer(
    config: TrainConfig, context: parallel.DistributedContext
) -> tuple[Trainer, Capture]:
    """A trainer of random weights on the ragged stream, and what it captures."""
    model = build_model(SHAPE, config, context, load=random_init(SEED))
    capture = Capture()
    stream: Any = RaggedStream(context.rank, context.world)
    trainer = Trainer(
        model=model,
        optimizer=build_optimizer(model, config),
        stream=stream,
        config=config,
        context=context,
        throughput=Throughput(SHAPE, seq_len=LENGTH, device=context.device, world=1),
        callbacks=[capture],
    )
    return trainer, capture


def loop_gradients(
    replicas: int, accumulations: tuple[int, ...], **changes: Any
) -> list[tuple[Gradients, float, float]]:
    """Gradients, loss and gradient norm of one step, for each number of micro-batches."""
    results = []
    context = parallel.init(replicas=replicas, threads=1)
    for accumulation in accumulations:
        micro = ROWS // context.world // accumulation
        config = options(
            global_batch=ROWS, micro_batch=micro, seq_len=LENGTH, replicas=replicas, **changes
        )
        trainer, capture = ragged_trainer(config, context)
        trainer.train_step()
        results.append((capture.gradients, trainer.loss, trainer.record["grad_norm"]))
    return results


@pytest.mark.parametrize(
    ("world", "replicas", "changes"),
    [
        (1, 1, {}),
        (2, 1, {"activation_checkpointing": True}),
        (4, 1, {"reshard_after_forward": True}),
        (2, 2, {}),
        (4, 2, {}),
    ],
)
def test_gradients_equal_a_single_process(
    world: int, replicas: int, changes: dict[str, Any]
) -> None:
    expected, loss = single_process_gradients()
    model_part = [g for name, g in expected.items() if not name.startswith("mask.")]
    norm = float(np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in model_part)))
    for rank in run_ranks(lambda: loop_gradients(replicas, (1, 2, 4), **changes), world):
        for gradients, rank_loss, rank_norm in rank:
            assert gradients.keys() == expected.keys()
            for name, value in gradients.items():
                np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6, err_msg=name)
            assert rank_loss == pytest.approx(loss, abs=1e-6)
            assert rank_norm == pytest.approx(norm, abs=1e-6)


def test_targets_are_the_next_tokens_that_count() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    targets, valid = next_token_targets(ids, np.array([[True, False, True, True]]))
    assert targets[0, :3].tolist() == [6, 7, 8]
    assert valid.tolist() == [[False, True, True, False]]
    assert next_token_targets(ids)[1].tolist() == [[True, True, True, False]]


def test_losses_do_not_depend_on_the_number_of_ranks(workspace: Path, tmp_path: Path) -> None:
    def train(output: Path) -> None:
        make_trainer(workspace, output, options(steps=8)).fit()

    for world in (1, 4):
        run_ranks(train, world, tmp_path / str(world))
    single = losses(tmp_path / "1")
    assert len(single) == 8 and single[-1] < single[0]
    np.testing.assert_allclose(losses(tmp_path / "4"), single, rtol=0, atol=1e-5)


def test_bf16_compute_keeps_fp32_masters(workspace: Path, tmp_path: Path) -> None:
    trainer = make_trainer(workspace, tmp_path / "bf16", options(steps=8, precision="bf16"))
    trainer.fit()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    moments = [s["exp_avg"].dtype for s in trainer.optimizer.state.values()]
    assert set(moments) == {torch.float32}
    make_trainer(workspace, tmp_path / "fp32", options(steps=8)).fit()
    exact = losses(tmp_path / "fp32")
    np.testing.assert_allclose(losses(tmp_path / "bf16"), exact, rtol=0, atol=2e-2)
    assert losses(tmp_path / "bf16") != exact


def test_a_damaged_shard_of_one_rank_stops_all_with_one_message(
    workspace: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(workspace / "tokens", damaged / "tokens")
    shard = next((damaged / "tokens" / "train" / "beta").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)

    def train() -> str:
        context = parallel.init(threads=1)
        data = damaged if context.rank == 1 else workspace
        config = options(global_batch=12, steps=3, eval_sequences=1)
        trainer = make_trainer(data, tmp_path / "run", config, context=context)
        with pytest.raises(InputError) as error:
            trainer.fit()
        return str(error.value)

    messages = run_ranks(train, 3)
    assert len(set(messages)) == 1 and f"{shard} is damaged" in messages[0]


class Clock(Callback):
    """Hooks that take a known time."""

    name: ClassVar[str] = "clock"

    def __init__(self) -> None:
        self.now = 100.0

    def after_optimizer_step(self, trainer: Trainer) -> None:
        assert trainer.step == 0
        self.now += 2.0

    def on_step_end(self, trainer: Trainer) -> None:
        self.now += 6.0


def test_the_step_is_timed_with_updates_but_without_what_follows(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    trainer = make_trainer(workspace, tmp_path, callbacks=[clock])
    trainer._call("on_train_start")
    trainer.train_step()
    assert trainer.record["tokens_per_second"] == 8 * 16 / 2
    assert trainer.throughput.summary()["wall_tokens_per_second"] == 8 * 16 / 8


def test_running_out_of_memory_names_the_options(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(workspace, tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.model, "forward", refuse)
    flags = "--micro-batch 1 or --activation-checkpointing or --reshard-after-forward"
    with pytest.raises(InputError, match=f"{flags}.*Tried to allocate"):
        trainer.fit()


def test_domain_losses_add_up(workspace: Path, tmp_path: Path) -> None:
    trainer = make_trainer(workspace, tmp_path)
    trainer._call("on_train_start")
    trainer.train_step()
    assert set(trainer.domain_tokens) == {"alpha", "beta"}
    assert sum(trainer.domain_tokens.values()) == 8 * 15
    total = sum(trainer.domain_loss_sum.values()) / (8 * 15)
    assert trainer.record["loss"] == pytest.approx(total)
    assert trainer.tokens == 8 * 16
