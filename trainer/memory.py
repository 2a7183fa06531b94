"""What a training run needs of a device's memory: refused before loading, explained when it runs
out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from data import machine
from data.errors import InputError, first_line, is_out_of_memory
from data.given import has_option
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.parallel import DistributedContext, compute_dtype

HEADROOM_SHARE = 0.7
"""Share of a device's memory that may be filled before activations by what merely saves time."""
STATE_BYTES = 16
"""Per parameter: weight, gradient and both Adam moments in fp32, divided over the shards."""
MOMENT_BYTES = 4
"""Per parameter that Muon trains: it has one moment less."""
FROZEN_BYTES = 4
"""Per parameter of a frozen model: the weight in fp32."""


def memory_problem(
    parameters: int,
    *,
    total: int,
    shards: int,
    gathered_bytes: int,
    device: str,
    shared: bool = False,
    teacher: int = 0,
    frozen: bool = False,
    trained: int | None = None,
    by_muon: int = 0,
) -> str | None:
    """What to say when a rank's part of the model alone exceeds its memory; None when it fits.

    Args:
        parameters: of the model.
        total: bytes a rank may use.
        shards: ranks that divide the model's state.
        gathered_bytes: bytes per parameter of the whole weights kept between forward and backward
            pass, 0 with --reshard-after-forward.
        device: what the memory belongs to, for the message.
        shared: whether the ranks of a machine share it, so that more of them find no more.
        teacher: bytes of a teacher's weights on the rank.
        frozen: whether the weights are not trained.
        trained: how many of the parameters are trained; None: all of them, or none if `frozen`.
        by_muon: parameters that Muon trains.
    """
    state = _state_bytes(parameters, by_muon, frozen=frozen, trained=trained) // shards
    gathered = parameters * gathered_bytes
    needed = state + gathered + teacher
    if needed <= total:
        return None
    moments = "moments" if by_muon else "Adam moments"
    what = "weights" if frozen else f"weights, gradients and {moments}"
    parts = f"{state / 1e9:.1f} GB of {what} over {shards} shard(s)"
    if gathered:
        parts += f", {gathered / 1e9:.1f} GB of gathered weights"
    more = "start more ranks"
    more += " (and fewer --replicas)" if has_option("--replicas") else ""
    if shared:
        more = "use a machine with more memory, or ranks on several"
    fixes = [more, "take a smaller model"]
    if teacher:
        parts += f", {teacher / 1e9:.1f} GB of the teacher's weights"
        fixes.append("leave the teacher out (--distill-weight 0)")
    if gathered and state <= total and has_option("--reshard-after-forward"):
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
    *,
    frozen: bool = False,
    trained: int | None = None,
    added: int = 0,
) -> None:
    """Raises InputError on every rank when `model`, with its `teacher` if there is one, cannot fit
    the memory of one of them.

    `frozen`: it is not trained; `trained`: that many of its parameters are, among which are those
    that were `added` to the model (adapters).
    """
    shards = context.mesh.get_group("shard").size()
    _, owner = _memory_and_owner(context.device)
    dtype = compute_dtype(config.precision, context.device)
    in_place = config.reshard_after_forward or (shards == 1 and dtype == torch.float32)
    context.raise_first(
        memory_problem(
            model.num_parameters() + added,
            total=total_memory(context.device),
            shards=shards,
            gathered_bytes=0 if in_place else dtype.itemsize,
            device=owner,
            shared=context.device.type == "cpu",
            frozen=frozen,
            trained=trained,
            by_muon=_by_muon(model, config),
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
    *,
    frozen: bool = False,
) -> float:
    """Bytes that every rank can spare for weights kept from one micro-batch to the next; 0 where
    memory is to be saved (--reshard-after-forward). Collective."""
    if config.reshard_after_forward:
        return 0.0
    shards = context.mesh.get_group("shard").size()
    itemsize = compute_dtype(config.precision, context.device).itemsize
    parameters = model.num_parameters()
    held = _state_bytes(parameters, _by_muon(model, config), frozen=frozen) / shards
    held += parameters * itemsize + teacher_bytes(teacher, itemsize, shards, whole=True)
    return min(context.gather(HEADROOM_SHARE * total_memory(context.device) - held))


def _by_muon(model: ModelConfig, config: TrainConfig) -> int:
    """How many parameters Muon trains."""
    return model.block_matrices if config.optimizer == "muon" else 0


def _state_bytes(parameters: int, by_muon: int, *, frozen: bool, trained: int | None = None) -> int:
    """Bytes of weights and of all that training keeps of them, over all shards."""
    if trained is None:
        trained = 0 if frozen else parameters
    kept = (STATE_BYTES - FROZEN_BYTES) * trained - MOMENT_BYTES * min(by_muon, trained)
    return FROZEN_BYTES * parameters + kept


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
    """Bytes of a GPU, or of what this process may use of the machine, which its ranks share."""
    return _memory_and_owner(device)[0]


def _memory_and_owner(device: torch.device) -> tuple[int, str]:
    """The same, and what sets this limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory), "the GPU"
    started = machine.group()
    ranks = (started.local_world if started else None) or 1
    return min(
        (size // ranks if shared else size, owner)
        for size, owner, shared in machine.memory_limits()
    )


def peak_memory(device: torch.device) -> dict[str, float]:
    """GB that tensors took at most on a GPU since the last call, and that were reserved for them;
    nothing on a CPU. For a step's record."""
    if device.type != "cuda":
        return {}
    peaks = {
        "memory_allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "memory_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return {name: round(value, 3) for name, value in peaks.items()}


@contextmanager
def collected_together(context: DistributedContext) -> Iterator[None]:
    """Has Python's garbage collector leave out what exists before the block.

    Otherwise it walks through all of the model and the libraries now and then, on each rank at
    another time, and all ranks wait for that one.
    """
    freeze = context.world > 1 and not gc.get_freeze_count()
    if freeze:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()


@contextmanager
def explain_out_of_memory(config: TrainConfig) -> Iterator[None]:
    """Turns an out-of-memory error, on a GPU or a CPU, into an InputError that names the options
    against it."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        fixes = []
        if config.micro_batch > 1:
            fixes.append(f"--micro-batch {config.micro_batch // 2}")
        if not config.activation_checkpointing and has_option("--activation-checkpointing"):
            fixes.append("--activation-checkpointing")
        # Ranks on CPUs share their machine's memory, and one in fp32 gathers nothing.
        started, on_gpu = machine.group(), isinstance(error, torch.OutOfMemoryError)
        alone = started is None or started.world == 1
        gathers = on_gpu or not alone or config.precision == "bf16"
        reshard = has_option("--reshard-after-forward") and not config.reshard_after_forward
        if gathers and reshard:
            fixes.append("--reshard-after-forward")
        fixes.append("more ranks" if on_gpu else "more memory (a higher limit, another machine)")
        raise InputError(
            f"out of {'GPU ' if on_gpu else ''}memory at "
            f"--micro-batch {config.micro_batch}, --seq-len {config.seq_len}; run the same command "
            f"with {' or '.join(fixes)}: it goes on from what was saved, if anything was "
            f"({first_line(error)})"
        ) from None
