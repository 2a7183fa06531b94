"""What a run needs is compared with the machine before anything is allocated."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from data import machine
from data.errors import InputError
from tests.trainer.tiny import SHAPE, options
from trainer import memory, parallel
from trainer.memory import (
    check_memory,
    collected_together,
    explain_out_of_memory,
    headroom_bytes,
    memory_problem,
    peak_memory,
    teacher_bytes,
    total_memory,
)
from trainer.models.decoder import CausalLM
from trainer.models.lora import Dropout, add_adapters
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


def test_muon_keeps_one_moment_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    context = parallel.init(threads=1)
    by_muon = options(optimizer="muon")
    needed = 16 * SHAPE.num_parameters() - 4 * SHAPE.block_matrices
    monkeypatch.setattr(memory, "total_memory", lambda _: needed)
    check_memory(SHAPE, by_muon, context)
    check_memory(SHAPE, options(), context, frozen=True)
    with pytest.raises(InputError, match="weights, gradients and Adam moments"):
        check_memory(SHAPE, options(), context)
    monkeypatch.setattr(memory, "total_memory", lambda _: needed - 1)
    with pytest.raises(InputError, match="weights, gradients and moments over 1"):
        check_memory(SHAPE, by_muon, context)
    monkeypatch.setattr(memory, "total_memory", lambda _: 40 * needed)
    freed = [headroom_bytes(SHAPE, config, context) for config in (by_muon, options())]
    assert freed[0] - freed[1] == 4 * SHAPE.block_matrices


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
        return memory_problem(LLAMA_7B, device="the GPU", shared=False, frozen=False, **sizes)

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
    with pytest.raises(InputError, match="use a machine with more memory"):
        build_model(huge, options(), context, load=None)
    needed = 16 * SHAPE.num_parameters()
    monkeypatch.setattr(memory, "total_memory", lambda _: needed)
    check_memory(SHAPE, options(), context)
    with pytest.raises(InputError, match="--reshard-after-forward"):
        check_memory(SHAPE, options(precision="bf16"), context)
    check_memory(SHAPE, options(precision="bf16", reshard_after_forward=True), context)
    monkeypatch.setattr(memory, "total_memory", lambda _: needed - 1)
    with pytest.raises(InputError, match="use a machine with more memory"):
        check_memory(SHAPE, options(), context)


def test_a_limit_below_the_machines_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(64 * GIB, "the machine", True), (1000, "the process (`ulimit -v`)", False)]
    monkeypatch.setattr(machine, "memory_limits", lambda: limits)
    with pytest.raises(InputError, match=r"but the process \(`ulimit -v`\) has 0\.0 GB for it"):
        check_memory(SHAPE, options(), parallel.init(threads=1))
    # A limit of each process is not divided by their number.
    group = machine.Group(0, 4, 0, 4, "here", 1)
    monkeypatch.setattr(machine, "group", lambda: group)
    assert total_memory(torch.device("cpu")) == 1000
    limits[1] = (GIB, "the control group (/sys/fs/cgroup/memory.max)", True)
    assert total_memory(torch.device("cpu")) == GIB // 4


def test_an_allocation_that_fails_on_a_cpu_is_explained() -> None:
    with pytest.raises(InputError) as caught, explain_out_of_memory(options(micro_batch=4)):
        torch.empty(1 << 60, dtype=torch.uint8)
    message = str(caught.value)
    assert message.startswith("out of memory at --micro-batch 4, --seq-len 16; run the same")
    assert "--micro-batch 2 or --activation-checkpointing" in message
    assert "DefaultCPUAllocator" in message
    # One process in fp32 gathers nothing, and more would share the same memory.
    assert "--reshard" not in message and "ranks" not in message and "more memory" in message


def test_more_ranks_are_advised_where_each_has_its_own_memory() -> None:
    sizes: dict[str, Any] = {"total": 10, "shards": 1, "gathered_bytes": 0, "device": "it"}
    own = memory_problem(LLAMA_7B, **sizes)
    assert own is not None and "start more ranks" in own
    shared = memory_problem(LLAMA_7B, **sizes, shared=True)
    assert shared is not None and "start more" not in shared
    assert "a machine with more memory, or ranks on several" in shared


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_other_forms_of_the_same(error: Exception) -> None:
    with pytest.raises(InputError, match="out of memory at"), explain_out_of_memory(options()):
        raise error


def test_on_a_gpu_it_says_so_and_other_errors_stay_themselves() -> None:
    with pytest.raises(InputError, match="out of GPU memory"), explain_out_of_memory(options()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory(options()):
        raise RuntimeError("shape mismatch")


def test_the_peak_of_a_step_is_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory(torch.device("cpu")) == {}
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 5_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 6_123_456_789)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    gpu = torch.device("cuda", 0)
    assert peak_memory(gpu) == {"memory_allocated_gb": 5.0, "memory_reserved_gb": 6.123}
    assert reset == [gpu]


def test_the_collector_leaves_out_what_existed_before() -> None:
    """Only where other ranks would wait for it."""
    context = parallel.init(threads=1)
    with collected_together(context):
        assert gc.get_freeze_count() == 0
    with collected_together(replace(context, world=2)):
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_adapters_need_the_weights_and_little_more(monkeypatch: pytest.MonkeyPatch) -> None:
    context = parallel.init(threads=1)

    def adapt(network: CausalLM) -> None:
        add_adapters(network, ("q_proj",), rank=2, scale=1.0, dropout=Dropout(0.0, 0))

    factors = 2 * 2 * (16 + 16)
    needed = 4 * SHAPE.num_parameters() + 16 * factors
    monkeypatch.setattr(memory, "total_memory", lambda _: needed)
    network = build_model(SHAPE, options(), context, load=None, adapt=adapt)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert trained == factors < SHAPE.num_parameters() / 20
    for less in (needed - 1, 4 * SHAPE.num_parameters() - 1):
        monkeypatch.setattr(memory, "total_memory", lambda _, most=less: most)
        with pytest.raises(InputError, match=r"parameters needs"):
            build_model(SHAPE, options(), context, load=None, adapt=adapt)
