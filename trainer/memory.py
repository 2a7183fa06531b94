"""What a training run needs of a device's memory: refused before loading, explained when it runs
out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data.errors import InputError
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.parallel import DistributedContext, compute_dtype

HEADROOM_SHARE = 0.7
"""Share of a device's memory that may be filled before activations by what merely saves time."""
STATE_BYTES = 16
"""Per parameter: weight, gradient and both Adam moments in fp32, divided over the shards."""


def memory_problem(
    parameters: int,
    *,
    total: int,
    shards: int,
    gathered_bytes: int,
    device: str,
    teacher: int = 0,
) -> str | None:
    """What to say when a rank's part of the model alone exceeds its memory; None when it fits.

    Args:
        parameters: of the model.
        total: bytes a rank may use.
        shards: ranks that divide the model's state.
        gathered_bytes: bytes per parameter of the whole weights kept between forward and backward
            pass, 0 with --reshard-after-forward.
        device: what the memory belongs to, for the message.
        teacher: bytes of a teacher's weights on the rank.
    """
    state = parameters * STATE_BYTES // shards
    gathered = parameters * gathered_bytes
    needed = state + gathered + teacher
    if needed <= total:
        return None
    parts = f"{state / 1e9:.1f} GB of weights, gradients and Adam moments over {shards} shard(s)"
    if gathered:
        parts += f", {gathered / 1e9:.1f} GB of gathered weights"
    fixes = ["start more ranks (and fewer --replicas)", "train a smaller model"]
    if teacher:
        parts += f", {teacher / 1e9:.1f} GB of the teacher's weights"
        fixes.append("leave the teacher out (--distill-weight 0)")
    if gathered and state <= total:
        fixes.insert(0, "add --reshard-after-forward")
    return (
        f"a model of {parameters:,} parameters needs {needed / 1e9:.1f} GB on each "
        f"rank before any activations ({parts}), but {device} has {total / 1e9:.1f} GB for it: "
        + ", or ".join(fixes)
    )


def check_memory(
    model: ModelConfig,
    config: TrainConfig,
    context: DistributedContext,
    teacher: ModelConfig | None = None,
) -> None:
    """Raises InputError on every rank when `model`, with its `teacher` if there is one, cannot fit
    the memory of one of them."""
    shards = context.mesh.get_group("shard").size()
    dtype = compute_dtype(config.precision, context.device)
    in_place = config.reshard_after_forward or (shards == 1 and dtype == torch.float32)
    context.raise_first(
        memory_problem(
            model.num_parameters(),
            total=total_memory(context.device),
            shards=shards,
            gathered_bytes=0 if in_place else dtype.itemsize,
            device="the GPU" if context.device.type == "cuda" else "the machine",
            teacher=teacher_bytes(
                teacher, dtype.itemsize, shards, whole=not config.reshard_after_forward
            ),
        )
    )


def headroom_bytes(
    model: ModelConfig,
    config: TrainConfig,
    context: DistributedContext,
    teacher: ModelConfig | None = None,
) -> float:
    """Bytes that every rank can spare for weights kept from one micro-batch to the next; 0 where
    memory is to be saved (--reshard-after-forward). Collective."""
    if config.reshard_after_forward:
        return 0.0
    shards = context.mesh.get_group("shard").size()
    itemsize = compute_dtype(config.precision, context.device).itemsize
    held = model.num_parameters() * (STATE_BYTES / shards + itemsize)
    held += teacher_bytes(teacher, itemsize, shards, whole=True)
    return min(context.gather(HEADROOM_SHARE * total_memory(context.device) - held))


def teacher_bytes(teacher: ModelConfig | None, itemsize: int, shards: int, *, whole: bool) -> int:
    """Bytes of a teacher's frozen weights on one rank.

    Its shard of all weights in the compute dtype, and what stays gathered from several shards:
    everything if `whole`, else what lies outside the blocks.
    """
    if teacher is None:
        return 0
    parameters = teacher.num_parameters()
    if shards == 1:
        return parameters * itemsize
    outside = teacher.hidden_size + parameters - teacher.num_parameters(embeddings=False)
    return parameters * itemsize // shards + (parameters if whole else outside) * itemsize


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine divided by its ranks."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return physical // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def explain_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turns a GPU's out-of-memory error into an InputError that names the options against it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fixes = []
        if config.micro_batch > 1:
            fixes.append(f"--micro-batch {config.micro_batch // 2}")
        if not config.activation_checkpointing:
            fixes.append("--activation-checkpointing")
        if not config.reshard_after_forward:
            fixes.append("--reshard-after-forward")
        fixes.append("more ranks")
        raise InputError(
            f"out of GPU memory at --micro-batch {config.micro_batch}, --seq-len "
            f"{config.seq_len}; run the same command with {' or '.join(fixes)}: it resumes from "
            f"the last checkpoint ({str(error).splitlines()[0]})"
        ) from None
