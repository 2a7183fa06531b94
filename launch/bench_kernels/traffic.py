"""Bytes that eager PyTorch and torch.compile move for the operators that have kernels of our own.

Nothing is computed: operators run on fake tensors, without memory, at LLaMA 2 7B's shapes. Eager:
of each aten kernel its distinct inputs and its outputs, views excepted. torch.compile: Inductor's
own count over the kernels that its CPU scheduler fuses. That is a lower bound for a GPU, where sums
over rows and sums over columns do not fuse; an access by index counts the whole tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.kernels.linear_cross_entropy import default_chunk

BATCH = 2
TOKENS = 8192
WIDTH = 4096
HEADS = 32
HEAD_DIM = 128
CHANNELS = 11008
VOCABULARY = 32000
"""One micro-batch of 2 x 4096 tokens in LLaMA 2 7B (arXiv 2307.09288)."""
PASSES = ("forward", "backward")

_aten = torch.ops.aten
_UNREAD = (_aten.zeros_like, _aten.ones_like, _aten.new_zeros, _aten.full_like, _aten.fill_)
_FREE = (_aten._unsafe_view, _aten.empty_like, _aten.new_empty, _aten.empty, _aten.empty_strided)
_SELECTING = (_aten.index_select, _aten.gather, _aten.embedding, _aten.index)


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator as plain PyTorch would write it."""

    name: str
    """Prefix of its kernels' names in launch/bench_kernels/static/kernels.py."""
    shape: str
    inputs: Callable[[], tuple[Tensor, ...]]
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one pass of one operator."""

    operator: str
    direction: str
    """forward or backward."""
    shape: str
    eager_bytes: int
    compiled_bytes: int | None
    """None where this PyTorch's Inductor does not tell."""


class AtenBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors that aten kernels read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += kernel_bytes(func, (args, kwargs), result)
        return result


def kernel_bytes(function: Any, arguments: Any, result: Any) -> int:
    """Bytes that one aten kernel reads and writes; 0 for views and allocations.

    A selection (index_select, gather) reads as much as it returns; an expanded tensor counts what
    it holds.
    """
    packet = function.overloadpacket
    aliases = [value.alias_info for value in function._schema.returns]
    if packet in _FREE or any(alias is not None and not alias.is_write for alias in aliases):
        return 0
    outputs = _bytes(result)
    # Questions about a tensor, such as its device, come this way too.
    if packet in _UNREAD or not _tensors(result):
        return outputs
    if packet in _SELECTING:
        index = sum(_bytes(x) for x in _tensors(arguments) if not x.is_floating_point())
        return 2 * outputs + index
    return _bytes(arguments) + outputs


def count(operator: Operator) -> list[Traffic]:
    """Bytes of the operator's forward and backward pass."""
    with FakeTensorMode():
        inputs = operator.inputs()
        eager = _count_eager(operator.function, inputs)
        compiled = _count_compiled(operator.function, inputs)
    return [
        Traffic(operator.name, direction, operator.shape, eager_bytes, compiled_bytes)
        for direction, eager_bytes, compiled_bytes in zip(PASSES, eager, compiled, strict=True)
    ]


def _count_eager(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[int]:
    totals = []
    with AtenBytes() as counter:
        outputs = tree_leaves(function(*inputs))
        totals.append(counter.total)
        gradients = [torch.empty_like(output) for output in outputs]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        torch.autograd.grad(outputs, wanted, gradients)
        totals.append(counter.total - totals[0])
    return totals


def _count_compiled(
    function: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> Sequence[int | None]:
    try:
        counts = _inductor_bytes(function, inputs)
    # Inductor promises nothing about the parts used here.
    except (ImportError, AttributeError, TypeError):
        return [None, None]
    return counts if len(counts) == 2 else [None, None]


def _inductor_bytes(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[int]:
    """Inductor's count for the graphs of the forward and the backward pass."""
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering

    totals: list[int] = []

    def schedule(gm: Any, example_inputs: Any) -> Any:
        view_to_reshape(gm)
        graph = GraphLowering(gm, example_inputs=example_inputs)
        with _inductor_handlers(graph):
            graph.run(*example_inputs)
            graph._update_scheduler()
            totals.append(int(graph.count_bytes()[0]))
        return make_boxed_func(gm.forward)

    def split(module: Any, joint_inputs: Any, **options: Any) -> Any:
        joint_graph_passes(module)
        return min_cut_rematerialization_partition(
            module, joint_inputs, compiler="inductor", **options
        )

    compiled = aot_function(
        function, schedule, schedule, partition_fn=split, decompositions=select_decomp_table()
    )
    outputs = tree_leaves(compiled(*inputs))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs])
    return totals


@contextmanager
def _inductor_handlers(graph: Any) -> Iterator[None]:
    from torch._guards import detect_fake_mode
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.virtualized import V

    handlers = (V.set_graph_handler(graph), V.set_fake_mode(detect_fake_mode(graph.example_inputs)))
    # Its GPU side fuses concatenations such as RoPE's; the CPU side has to be asked.
    with (
        handlers[0],
        handlers[1],
        V.set_debug_handler(DebugContext()),
        config.patch(force_pointwise_cat=True),
    ):
        yield


def _tensors(values: Any) -> list[Tensor]:
    """Distinct tensors among nested values."""
    return list({id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}.values())


def _bytes(values: Any) -> int:
    total = 0
    for tensor in _tensors(values):
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride else 1
        total += size if tensor.numel() else 0
    return total


def _bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def _mask(size: int) -> Tensor:
    return torch.empty(size, requires_grad=True)


def rms_norm(x: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm of the sum as Hugging Face writes it."""
    total = x + residual
    wide = total.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return normal.to(gain.dtype) * gain, total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotary positions as Hugging Face writes them; cos and sin [S, head_dim]."""

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    return tuple(x * cos + rotate_half(x) * sin for x in (query, key))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's fused attention, then the mask of the heads."""
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output * mask.to(output.dtype)[:, None, None]


def gather_scale(weight: Tensor, rows: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    scale = row_scale.index_select(0, rows)[:, None]
    return (weight.index_select(0, rows) * scale * column_scale).to(weight.dtype)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def distillation(logits: Tensor, targets: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies, and divergences from the teacher whose logits are given."""
    student, teacher = logits.float().log_softmax(1), teacher_logits.float().log_softmax(1)
    divergences = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return functional.nll_loss(student, targets, reduction="none"), divergences


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def _heads() -> Tensor:
    return _bf16(BATCH, HEADS, TOKENS // BATCH, HEAD_DIM)


def _ids(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64)


def _chunk(models: int) -> int:
    """Tokens of which the loss holds logits at a time."""
    return default_chunk(TOKENS, models * VOCABULARY, "cuda")


def _table() -> Tensor:
    return torch.empty(TOKENS // BATCH, HEAD_DIM, dtype=torch.bfloat16)


_HEADS = f"[{BATCH}, {HEADS}, {TOKENS // BATCH}, {HEAD_DIM}]"

OPERATORS = (
    Operator(
        "rms_norm",
        f"[{TOKENS}, {WIDTH}] with residual, gain",
        lambda: (_bf16(TOKENS, WIDTH), _bf16(TOKENS, WIDTH), _bf16(WIDTH)),
        rms_norm,
    ),
    Operator(
        "swiglu",
        f"[{TOKENS}, {CHANNELS}]",
        lambda: (_bf16(TOKENS, CHANNELS), _bf16(TOKENS, CHANNELS)),
        swiglu,
    ),
    Operator(
        "rope",
        f"queries and keys {_HEADS}",
        lambda: (_heads(), _heads(), _table(), _table()),
        rope,
    ),
    Operator(
        "attention",
        f"{_HEADS} causal, with mask",
        lambda: (_heads(), _heads(), _heads(), _mask(HEADS)),
        attention,
    ),
    Operator(
        "gather_scale",
        f"[{WIDTH}, {CHANNELS}], all rows by index, with scales",
        lambda: (_bf16(WIDTH, CHANNELS), _ids(WIDTH), _mask(WIDTH), _mask(CHANNELS)),
        gather_scale,
    ),
    Operator(
        "cross_entropy",
        f"[{_chunk(1)}, {VOCABULARY}], one chunk",
        lambda: (_bf16(_chunk(1), VOCABULARY), _ids(_chunk(1))),
        cross_entropy,
    ),
    Operator(
        "distillation",
        f"[{_chunk(2)}, {VOCABULARY}] and the teacher's, one chunk",
        lambda: (
            _bf16(_chunk(2), VOCABULARY),
            _ids(_chunk(2)),
            _bf16(_chunk(2), VOCABULARY).detach(),
        ),
        distillation,
    ),
    Operator(
        "linear_cross_entropy",
        f"[{TOKENS}, {WIDTH}] x [{VOCABULARY}, {WIDTH}]",
        lambda: (_bf16(TOKENS, WIDTH), _bf16(VOCABULARY, WIDTH), _ids(TOKENS)),
        linear_cross_entropy,
    ),
)
