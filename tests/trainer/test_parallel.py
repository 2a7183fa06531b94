"""Collectives, and the context without a launcher."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data import machine
from data.errors import InputError
from tests.distributed import run_ranks
from trainer import parallel


def test_stands_alone_without_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.world_size() == 1
    context = parallel.init(threads=1)
    assert (context.rank, context.world, context.is_main) == (0, 1, True)
    assert torch.get_num_threads() == 1
    assert "srun" not in capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    parallel.init(threads=1)
    assert "warning: srun started 2 tasks" in capsys.readouterr().err
    assert context.gather("x") == ["x"] and context.broadcast(3) == 3
    with pytest.raises(InputError, match="too big"):
        context.raise_first("too big")


def exercise(folder: Path) -> dict[str, Any]:
    context = parallel.init(threads=1)
    rank = context.rank
    with context.rank_zero_first():
        if context.is_main:
            (folder / "made").write_text("by rank 0")
        found = (folder / "made").exists()
    try:
        context.raise_first("rank 2 failed" if rank == 2 else None)
        error = ""
    except InputError as problem:
        error = str(problem)
    return {
        "sum": context.all_reduce_sum(torch.tensor([float(rank), 1.0])).tolist(),
        "any": (context.any(rank == 1), context.any(False)),
        "broadcast": context.broadcast({"rank": rank}),
        "gather": context.gather(rank),
        "found": found,
        "error": error,
        "world": parallel.world_size(),
        "initialised": dist.is_initialized(),
    }


def test_collectives(tmp_path: Path) -> None:
    for result in run_ranks(exercise, 3, tmp_path):
        assert result == {
            "sum": [3.0, 3.0],
            "any": (True, False),
            "broadcast": {"rank": 0},
            "gather": [0, 1, 2],
            "found": True,
            "error": "rank 2 failed",
            "world": 3,
            "initialised": True,
        }


def mesh_of(replicas: int) -> tuple[Any, ...]:
    mesh = parallel.init(replicas=replicas, threads=1).mesh
    return mesh.mesh_dim_names, mesh.shape


def test_meshes() -> None:
    assert run_ranks(mesh_of, 4, 1)[0] == (("shard",), (4,))
    assert run_ranks(mesh_of, 4, 2)[0] == (("replicate", "shard"), (2, 2))


def test_precisions() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert parallel.compute_dtype("auto", cpu) == torch.float32
    assert parallel.compute_dtype("auto", cuda) == torch.bfloat16
    assert parallel.compute_dtype("bf16", cpu) == torch.bfloat16
    assert parallel.compute_dtype("fp32", cuda) == torch.float32


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"4 ranks .* 2 visible GPUs.*--nproc_per_node 2"):
        parallel.init()
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(InputError, match="3 ranks"):
        parallel.init()


def launched(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | more).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("gpus", "local", "index"),
    [
        (4, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 3),
        # Slurm shows each task its own GPU, which is then the only one.
        (1, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 0),
        (1, {}, 0),
    ],
)
def test_the_gpu_of_a_rank(
    gpus: int, local: dict[str, str], index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    launched(monkeypatch, **local)
    assert parallel._gpu(machine.group()) == index
    assert parallel._gpu(None) == 0


def test_a_rank_that_cannot_know_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched(monkeypatch)
    with pytest.raises(InputError, match=r"LOCAL_RANK is not set, .*which of 4 visible GPUs"):
        parallel._gpu(machine.group())


def test_what_cuda_is_told_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*parallel.ALLOCATOR_VARIABLES, *parallel.CUDA_DEFAULTS)
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    seen: list[str | None] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda _: seen.append(os.environ.get("PYTORCH_ALLOC_CONF"))
    )
    device = torch.device("cuda", 0)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        parallel._prepare_cuda(device)
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
    assert seen == ["expandable_segments:True"] == [os.environ["PYTORCH_CUDA_ALLOC_CONF"]]
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    # Settings of the user's own stay, under either name.
    for name in parallel.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "9")
    parallel._prepare_cuda(device)
    assert seen[-1] is None and os.environ["TORCH_FR_BUFFER_SIZE"] == "9"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


def timeouts() -> list[float]:
    context = parallel.init(threads=1)
    found = []
    for group in (context.step_group, context.cpu_group):
        backend = group._get_backend(torch.device("cpu"))
        found.append(backend.options._timeout.total_seconds())
    return found


def test_a_rank_stuck_in_a_step_is_noticed_sooner_than_a_download() -> None:
    (step, host), _ = run_ranks(timeouts, 2)
    assert (step, host) == (1800.0, 86400.0)


def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(parallel, "available_cores", lambda: 1)
    parallel.init()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_threads_that_no_system_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(parallel, "available_cores", lambda: 2)
    with pytest.raises(InputError, match=r"--threads 9999: .* 2 cores.* use --threads 2 or less"):
        parallel.init(threads=9999)
    assert torch.get_num_threads() == before


def test_variables_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="4")
    with pytest.raises(InputError, match="RANK=4 is not below WORLD_SIZE=4"):
        parallel.init()


def test_a_machine_without_a_network_to_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("ifa != nullptr. Unable to find interface for: [127.0.0.1]")

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(InputError, match=r"no network to itself .* `ip link set lo up`"):
        parallel._join(None, torch.device("cpu"))
