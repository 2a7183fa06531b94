"""What a run needs is compared with the machine before anything is allocated."""

from dataclasses import replace

import pytest
import torch

from data.errors import InputError
from tests.trainer.tiny import SHAPE, options
from trainer import memory, parallel
from trainer.memory import check_memory, memory_problem, teacher_bytes, total_memory
from trainer.run import build_model

GIB = 1 << 30
LLAMA_7B = 6_738_415_616


def problem(total: int, shards: int, gathered: int) -> str | None:
    return memory_problem(
        LLAMA_7B, total=total, shards=shards, gathered_bytes=gathered, device="the GPU"
    )


@pytest.mark.parametrize(("total", "shards", "gathered"), [(80, 8, 2), (80, 2, 2), (80, 2, 0)])
def test_models_that_fit(total: int, shards: int, gathered: int) -> None:
    assert problem(total * GIB, shards, gathered) is None


def test_state_alone_is_too_much() -> None:
    text = problem(80 * GIB, 1, 2)
    assert text is not None and "--reshard-after-forward" not in text
    assert "6,738,415,616 parameters needs 121.3 GB" in text and "has 85.9 GB" in text
    assert "107.8 GB of weights, gradients and Adam moments over 1 shard(s)" in text
    assert "more ranks" in text and "smaller model" in text


def test_gathered_weights_are_what_is_too_much() -> None:
    text = problem(24 * GIB, 6, 2)
    assert text is not None and "13.5 GB of gathered weights" in text
    assert "--reshard-after-forward" in text
    assert problem(24 * GIB, 6, 0) is None
    assert problem(16 * GIB, 6, 0) is not None


def test_a_teacher_needs_its_shard_and_what_stays_gathered() -> None:
    block, outside = SHAPE.num_parameters(embeddings=False), 259 * 16
    assert teacher_bytes(None, 2, 4, whole=True) == 0
    assert teacher_bytes(SHAPE, 2, 1, whole=True) == 2 * (block + outside)
    assert teacher_bytes(SHAPE, 2, 4, whole=True) == 2.5 * (block + outside)
    # The final norm stays gathered with embedding and head.
    expected = 0.5 * (block + outside) + 2 * (outside + 16)
    assert teacher_bytes(SHAPE, 2, 4, whole=False) == expected


def test_a_teacher_is_named_when_it_is_too_much() -> None:
    def with_teacher(teacher: int) -> str | None:
        sizes = {"total": 80 * GIB, "shards": 2, "gathered_bytes": 2, "teacher": teacher}
        return memory_problem(LLAMA_7B, **sizes, device="the GPU")

    assert with_teacher(15 * 10**9) is None
    text = with_teacher(20 * 10**9)
    assert text is not None and "20.0 GB of the teacher's weights" in text
    assert "needs 87.4 GB" in text and "leave the teacher out (--distill-weight 0)" in text


def test_the_machine_is_shared_by_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    whole = total_memory(cpu)
    assert whole > 1 << 28
    launched = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert total_memory(cpu) == whole // 4


def test_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    context = parallel.init(threads=1)
    huge = replace(SHAPE, hidden_size=1 << 20, intermediate_size=1 << 22)
    with pytest.raises(InputError, match="start more ranks"):
        build_model(huge, options(), context, load=None)
    needed = 16 * SHAPE.num_parameters()
    monkeypatch.setattr(memory, "total_memory", lambda _: needed)
    check_memory(SHAPE, options(), context)
    with pytest.raises(InputError, match="--reshard-after-forward"):
        check_memory(SHAPE, options(precision="bf16"), context)
    check_memory(SHAPE, options(precision="bf16", reshard_after_forward=True), context)
    monkeypatch.setattr(memory, "total_memory", lambda _: needed - 1)
    with pytest.raises(InputError, match="start more ranks"):
        check_memory(SHAPE, options(), context)
