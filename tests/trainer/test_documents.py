"""Steps on packed documents equal a single process that sees each document alone, on any layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.batches import Batch
from data.mixture import MixtureConfig
from data.reader import Documents, TokenReader
from tests.distributed import run_ranks
from tests.factories import CHATML, write_chat, write_model, write_tokenizer
from tests.trainer.test_loop import LENGTH, ROWS, SEED, Capture, Gradients, make_masks
from tests.trainer.tiny import SHAPE, losses, options
from trainer import parallel
from trainer.config import DistillationConfig
from trainer.distillation import TeacherSource, load_teacher
from trainer.evaluate import evaluate
from trainer.loop import Trainer
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_config, load_model
from trainer.optimizer import build_optimizer
from trainer.run import build_model, build_trainer, random_init
from trainer.throughput import Throughput

SPOKEN = replace(SHAPE, vocab_size=261)
"""With rows for the tokens of chatml."""
HALF = DistillationConfig(weight=0.5, temperature=2.0, top_k=0)


class PackedStream:
    """One global batch of packed documents in which few tokens count, and none in the first rows.

    `counting` False: none at all.
    """

    domains: ClassVar[list[str]] = ["alpha", "beta"]

    def __init__(self, rank: int = 0, world: int = 1, counting: bool = True) -> None:
        share = ROWS // world
        self._mine = slice(rank * share, (rank + 1) * share)
        self._counting = counting

    def next(self) -> Batch:
        generator = np.random.default_rng(SEED)
        ids = generator.integers(0, SHAPE.vocab_size, (ROWS, LENGTH))
        begins = generator.random((ROWS, LENGTH)) < 0.3
        begins[:, 0] = False
        documents = np.cumsum(begins, axis=1, dtype=np.int32)
        valid = (generator.random((ROWS, LENGTH)) < 0.5) & self._counting
        # So that every rank of four has micro-batches without any target.
        valid[::4] = False
        domains = np.arange(ROWS) % 2
        mine = self._mine
        return Batch(
            ids=ids[mine],
            domains=domains[mine],
            step=0,
            valid=valid[mine],
            documents=documents[mine],
        )


def parts(batch: Batch) -> list[tuple[torch.Tensor, np.ndarray, int]]:
    """Each document alone, which of its tokens count, and its domain."""
    assert batch.documents is not None and batch.valid is not None
    found = []
    for ids, documents, valid, domain in zip(
        batch.ids, batch.documents, batch.valid, batch.domains, strict=True
    ):
        for number in range(documents[-1] + 1):
            own = documents == number
            found.append((torch.from_numpy(ids[own]), valid[own], int(domain)))
    return found


def single_process_step(teacher: Path | None) -> tuple[Gradients, float, dict[str, float]]:
    """Gradients, mean cross-entropy and that of each domain, document by document."""
    model, masks = CausalLM(SHAPE), make_masks()
    init_weights(model, seed=SEED)
    found: list[list[torch.Tensor]] = [[], [], []]
    taught = None if teacher is None else load_model(teacher)
    owners: list[int] = []
    for ids, valid, domain in parts(PackedStream().next()):
        chosen = torch.from_numpy(valid[1:])
        logits = model(ids.unsqueeze(0), masks=masks)[0, :-1][chosen]
        found[0].append(logits)
        found[1].append(ids[1:][chosen])
        if taught is not None:
            with torch.no_grad():
                found[2].append(taught(ids.unsqueeze(0))[0, :-1][chosen])
        owners += [domain] * int(chosen.sum())
    logits, targets = torch.cat(found[0]), torch.cat(found[1])
    each = F.cross_entropy(logits, targets, reduction="none")
    loss = each.mean()
    if found[2]:
        student = (logits / 2).log_softmax(1)
        kl = F.kl_div(student, (torch.cat(found[2]) / 2).softmax(1), reduction="batchmean")
        (0.5 * loss + 0.5 * 4 * kl).backward()
    else:
        loss.backward()
    gradients = {
        f"mask.{n}": z.grad.numpy() for n, z in masks.tensors().items() if z.grad is not None
    }
    gradients |= {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    of = torch.tensor(owners)
    by_domain = {n: each[of == i].mean().item() for i, n in enumerate(PackedStream.domains)}
    return gradients, loss.item(), by_domain


def one_step(
    accumulations: tuple[int, ...], teacher: Path | None, counting: bool = True, **changes: Any
) -> list[tuple[Gradients, dict[str, Any]]]:
    """Gradients and record of a trainer's step, for each number of micro-batches."""
    results = []
    context = parallel.init(replicas=changes.get("replicas", 1), threads=1)
    for accumulation in accumulations:
        micro = ROWS // context.world // accumulation
        config = options(global_batch=ROWS, micro_batch=micro, seq_len=LENGTH, **changes)
        model = build_model(SHAPE, config, context, load=random_init(SEED))
        capture = Capture()
        stream: Any = PackedStream(context.rank, context.world, counting)
        trainer = Trainer(
            model=model,
            optimizer=build_optimizer(model, config),
            stream=stream,
            config=config,
            context=context,
            throughput=Throughput(SHAPE, seq_len=LENGTH, device=context.device, world=1),
            callbacks=[capture],
        )
        if teacher is not None:
            source = TeacherSource(teacher, load_config(teacher))
            trainer.teacher = load_teacher(source, HALF, config, SHAPE, context)
        trainer.train_step()
        results.append((capture.gradients, trainer.record))
    return results


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than the student, and far from uniform."""
    root = tmp_path_factory.mktemp("teacher")
    return write_model(root / "model", hidden_size=48, initializer_range=0.2)


@pytest.mark.parametrize(
    ("world", "taught", "changes"),
    [
        (1, False, {}),
        (1, True, {}),
        (2, False, {"activation_checkpointing": True}),
        (4, False, {"reshard_after_forward": True}),
        (4, True, {"replicas": 2}),
    ],
)
def test_gradients_equal_documents_alone(
    world: int, taught: bool, changes: dict[str, Any], teacher: Path
) -> None:
    source = teacher if taught else None
    expected, loss, by_domain = single_process_step(source)
    for rank in run_ranks(
        lambda: one_step((1, 4) if taught else (1, 2, 4), source, **changes), world
    ):
        for gradients, record in rank:
            assert gradients.keys() == expected.keys()
            for name, value in gradients.items():
                np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6, err_msg=name)
            assert record["loss"] == pytest.approx(loss, abs=1e-6)
            assert record["domain_loss"] == pytest.approx(by_domain, abs=1e-6)
            targets = sum(int(valid[1:].sum()) for _, valid, _ in parts(PackedStream().next()))
            assert record["targets"] == targets


def test_a_batch_without_any_target_changes_no_gradient_to_nan(teacher: Path) -> None:
    for gradients, record in one_step((1, 4), teacher, counting=False):
        assert all((value == 0).all() for value in gradients.values())
        assert record["loss"] == record["distill_kl"] == record["grad_norm"] == 0
        assert record["domain_loss"] == {} and record["targets"] == 0


@pytest.fixture(scope="module")
def chat_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    tokenizer = write_tokenizer(root / "tokenizer", *CHATML)
    return write_chat(root / "tokens", tokenizer, number=120)


@pytest.mark.parametrize(("world", "batch"), [(1, 3), (2, 2), (3, 4)])
def test_held_out_losses_equal_conversations_alone(
    chat_tokens: Path, world: int, batch: int
) -> None:
    def reader() -> TokenReader:
        return TokenReader(chat_tokens, 128, split="held_out", documents=None)

    def measure() -> tuple[float, int]:
        context = parallel.init(threads=1)
        model = build_model(SPOKEN, options(), context, load=random_init(1))
        result = evaluate(model, reader(), ["talks"], 7, batch, context)["talks"]
        return result.loss, result.tokens

    model = CausalLM(SPOKEN)
    init_weights(model, seed=1)
    read = reader().samples("talks", np.arange(7))
    whole = Batch(read.ids, np.zeros(7, np.int64), 0, read.valid, read.documents)
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, valid, _ in parts(whole):
            chosen = torch.from_numpy(valid[1:])
            logits = model(ids.unsqueeze(0))[0, :-1][chosen]
            total += F.cross_entropy(logits, ids[1:][chosen], reduction="sum").item()
            count += int(chosen.sum())
    for loss, tokens in run_ranks(measure, world):
        assert tokens == count > 0
        assert loss == pytest.approx(total / count, abs=1e-5)


def train(data: Path, output: Path, documents: Documents | None = None, seq_len: int = 64) -> None:
    config = options(steps=4, seq_len=seq_len)
    context = parallel.init(threads=1)
    reader = TokenReader(data, seq_len, documents=documents)
    trainer = build_trainer(
        build_model(SPOKEN, config, context, load=random_init(config.seed)),
        config,
        context,
        output=output,
        reader=reader,
        held_out=None,
        weights={domain: 1 / len(reader.domains) for domain in reader.domains},
        reference={},
        mixture=MixtureConfig(kind="fixed"),
        description="test",
        tensorboard=False,
    )
    trainer.fit()


def test_losses_do_not_depend_on_the_number_of_ranks(chat_tokens: Path, tmp_path: Path) -> None:
    for world in (1, 4):
        run_ranks(train, world, chat_tokens, tmp_path / str(world), None, 128)
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), rtol=0, atol=1e-5)


def test_joined_is_what_training_without_the_option_is(workspace: Path, tmp_path: Path) -> None:
    """Bit for bit: no document is passed, and the same function runs."""
    found = []
    choices: tuple[Documents | None, ...] = (None, "joined", "apart")
    for number, documents in enumerate(choices):
        train(workspace / "tokens", tmp_path / str(number), documents)
        found.append(losses(tmp_path / str(number)))
    assert found[0] == found[1] != found[2]
