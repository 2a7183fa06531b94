"""Ranks, devices and sharding: one path for a single process, torchrun on CPUs (gloo) and GPUs
(nccl)."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from data.errors import InputError, MissingInput, first_line
from data.given import given
from data.log import logger
from data.machine import Group, available_cores, group, tasks_without_ranks
from trainer.agreement import require_same
from trainer.meeting import meet

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for one that is stuck in a step; one that dies is noticed at once."""
HOST_TIMEOUT = timedelta(hours=24)
"""How long they wait on the host, where rank 0 downloads a model or checks one alone."""
MOST_THREADS = 64
"""CPU threads per core that may be asked for; thousands are more than the system starts."""
CUDA_DEFAULTS = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
"""What the last collectives were is written down when one of them times out."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second is the first's name up to PyTorch 2.9, and still read."""


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """Where this process stands among its peers, and the collectives that trainers and callbacks
    use."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    """("shard",), or ("replicate", "shard") when the sharded model is replicated (HSDP)."""
    cpu_group: dist.ProcessGroup
    """A gloo group for bookkeeping on the host, so that flags never wait for a GPU stream. It waits
    for HOST_TIMEOUT."""
    step_group: dist.ProcessGroup
    """The same for what every step exchanges: it waits for STEP_TIMEOUT."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` (on any device) over all ranks in place and returns it."""
        if self.world > 1:
            dist.all_reduce(tensor, group=self.step_group if tensor.device.type == "cpu" else None)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on at least one rank."""
        return bool(self.all_reduce_sum(torch.tensor(int(flag))).item())

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.cpu_group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value` in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Runs the block on rank 0, then on the others, which find what rank 0 left on disk."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()

    def raise_on_any_rank(self, action: Callable[[], T]) -> T:
        """The result of `action`; an InputError that any rank's raises is raised on every rank."""
        caught, results = None, []
        try:
            results.append(action())
        except InputError as error:
            caught = error
        if self.any(caught is not None):
            missing = self.any(isinstance(caught, MissingInput))
            try:
                self.raise_first(None if caught is None else str(caught))
            except InputError as error:
                raise (MissingInput(str(error)) if missing else error) from caught
        return results[0]

    def raise_first(self, problem: str | None) -> None:
        """Raises InputError on every rank with the first `problem` that any rank reports; None is
        no problem."""
        problems = [text for text in self.gather(problem) if text]
        if problems:
            raise InputError(problems[0])


def world_size() -> int:
    """Number of ranks this process was started with, known before anything is initialised.

    Raises InputError where the launcher's variables contradict each other.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    started = group()
    return started.world if started else 1


def init(*, replicas: int = 1, threads: int | None = None) -> DistributedContext:
    """Joins the ranks that a launcher started, or stands alone when there is no launcher.

    `threads` are CPU threads per rank (None: this machine's cores divided by its ranks). An already
    initialised default process group is used as it is. `replicas` must divide the world size
    (`config.check_layout`). Raises InputError when the launcher's variables contradict each other,
    when the ranks do not meet or were given different options, or when there are more ranks than
    GPUs.
    """
    started = group()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_cuda:
        device = torch.device("cuda", _gpu(started))
        _prepare_cuda(device)
    if started is None and (lonely := tasks_without_ranks()):
        logger.warning(lonely)
    if not dist.is_initialized():
        _join(started, device)
    world = dist.get_world_size()
    groups = _host_groups(world, on_cuda)
    if world > 1:
        _require_same_options(world, groups["cpu_group"])
    if not on_cuda:
        keep_freed_memory()
    local_world = (started.local_world if started else None) or world
    if threads is not None and threads > MOST_THREADS * available_cores():
        raise InputError(
            f"--threads {threads}: this process may use {available_cores()} cores, and that many "
            f"threads would end it; use --threads {available_cores()} or less"
        )
    torch.set_num_threads(threads or max(1, available_cores() // local_world))
    assert world % replicas == 0
    if replicas > 1:
        shape, names = (replicas, world // replicas), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return DistributedContext(dist.get_rank(), world, device, mesh, **groups)


def _host_groups(world: int, on_cuda: bool) -> dict[str, dist.ProcessGroup]:
    """The groups of a DistributedContext, by their name in it."""
    whole = dist.group.WORLD
    assert whole is not None
    waiting = {"cpu_group": HOST_TIMEOUT, "step_group": STEP_TIMEOUT}
    return {
        name: dist.new_group(backend="gloo", timeout=timeout)
        if world > 1 and (on_cuda or timeout > STEP_TIMEOUT)
        else whole
        for name, timeout in waiting.items()
    }


def _require_same_options(world: int, host: dist.ProcessGroup) -> None:
    """Raises InputError on every rank where their command lines ask for different work."""

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world
        dist.all_gather_object(values, value, group=host)
        return values

    fix = (
        "start all of them with the same command; shorn.toml and SHORN_ variables of every machine "
        "count too"
    )
    require_same(given(), gather, fix, first="the command")


def _prepare_cuda(device: torch.device) -> None:
    """Sets what has to be set before memory is taken on a GPU; the user's own settings stay."""
    for name, value in CUDA_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        # Every step of shearing has other sizes, which would leave holes between fixed segments.
        os.environ |= dict.fromkeys(ALLOCATOR_VARIABLES, "expandable_segments:True")
    # Partial sums of weight gradients would be rounded to bf16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.cuda.set_device(device)


def _gpu(started: Group | None) -> int:
    """Index of this rank's GPU among those it sees. Raises InputError where it has none."""
    gpus = torch.cuda.device_count()
    if started is None or gpus == 1:
        # A launcher may show each rank its own GPU alone; whether it did is seen when they meet.
        return 0
    local_rank = started.local_rank
    # All ranks of the machine see the same numbers, so that rank 0 reports the error.
    ranks = max((local_rank or 0) + 1, started.local_world or 1)
    if ranks > gpus:
        raise InputError(
            f"{ranks} ranks were started on a machine with {gpus} visible GPUs, and each rank "
            f"needs its own: use --nproc_per_node {gpus}"
        )
    if local_rank is None and started.world > 1:
        raise InputError(
            f"LOCAL_RANK is not set, which would say which of {gpus} visible GPUs is this rank's: "
            "set it, or show each rank one GPU with CUDA_VISIBLE_DEVICES"
        )
    return local_rank or 0


def _join(started: Group | None, device: torch.device) -> None:
    """Makes the default process group."""
    on_cuda = device.type == "cuda"
    gpu = str(torch.cuda.get_device_properties(device).uuid) if on_cuda else None
    alone = started is None or not started.address
    store = dist.HashStore() if started is None or alone else meet(started, gpu)
    store.set_timeout(HOST_TIMEOUT)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=0 if started is None else started.rank,
            world_size=1 if started is None else started.world,
            timeout=STEP_TIMEOUT,
            device_id=device if on_cuda else None,
        )
    except RuntimeError as error:
        if alone and "interface" not in str(error):
            raise
        if alone:
            raise InputError(
                f"this machine has no network to itself ({first_line(error)}): bring it up, as "
                "root with `ip link set lo up`"
            ) from None
        raise InputError(
            f"the ranks have met, but cannot talk to each other ({first_line(error)}); name the "
            "network between them with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from None


def keep_freed_memory() -> None:
    """Has glibc reuse large freed blocks instead of unmapping them.

    A step allocates and frees gigabytes; mapping them anew each time costs a page fault per 4 KiB.
    """
    max_mapped_blocks, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    set_option(max_mapped_blocks, 0)
    set_option(trim_threshold, -1)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that "auto", "bf16" or "fp32" means on `device`."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def shard(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """FSDP2: each block and the rest of `model` become one sharded group, with fp32 masters and
    fp32 sums.

    Gradients are summed over ranks, not averaged: the loss carries the division by the global
    number of tokens. Inputs are not cast, because token weights must stay fp32. One rank whose
    weights already have `dtype` computes on them as they are: it would gather and reduce copies.
    """
    if mesh.size() == 1 and all(parameter.dtype == dtype for parameter in model.parameters()):
        return
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    assert isinstance(model, FSDPModule)
    if mesh.size() > 1:
        # Each group has its own factor: setting the root's alone would leave the blocks averaged.
        for group in model.modules():
            if isinstance(group, FSDPModule):
                group.set_gradient_divide_factor(1.0)
                # gloo has no pre-multiplied sum, which a factor without forced SUM would select.
                group.set_force_sum_reduction_for_comms(True)


def prepare_pass(model: nn.Module, *, last: bool, reshard_after_backward: bool) -> None:
    """Says what a sharded model does in the coming forward and backward pass; `last`: of a step."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        # Replicas (HSDP) exchange the accumulated gradient once per step.
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(reshard_after_backward)


def reshard(model: nn.Module) -> None:
    """Frees gathered weights, so that the next forward pass gathers the current ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_region(parameter: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """The part of a parameter stored on this rank, and where it lies in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    region = tuple(
        slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)
    )
    return parameter.to_local(), region


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor, gathered; collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
