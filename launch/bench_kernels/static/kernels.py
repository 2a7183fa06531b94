"""The Triton kernels of the static report, as they are launched in LLaMA 2 7B (arXiv 2307.09288).

A launch is what an operator does with tensors on the meta device: what is compiled is what it asks
Triton for, and its traffic is that of the tensors it passes. Importing this needs Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from launch.bench_kernels.traffic import (
    BATCH,
    CHANNELS,
    HEAD_DIM,
    HEADS,
    TOKENS,
    VOCABULARY,
    WIDTH,
)
from trainer.kernels import (
    attention_triton,
    cross_entropy_triton,
    gather_scale_triton,
    rms_norm_triton,
    rope_triton,
    swiglu_triton,
)
from trainer.kernels.attention import Inputs
from trainer.kernels.gather_scale import Selection
from trainer.kernels.linear_cross_entropy import default_chunk

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
LENGTH = TOKENS // BATCH
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel, and a call that launches it."""

    name: str
    """Operator and pass, as "rms_norm.forward"."""
    kernel: str
    """Name of the @triton.jit function: the call may launch others too."""
    call: Callable[[], Any]
    shape: str
    """The tensors, in words."""
    flops: int = 0
    """Floating-point operations of its matrix products, of visible pairs in attention."""


Launches = tuple[Launch, ...]


def empty(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def indices(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def attention(
    name: str = "attention",
    *,
    key_heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    dtype: str = "bf16",
    optional: bool = True,
) -> Launches:
    """With a mask and documents, or without what is optional."""
    query, output, gradient = (empty(BATCH, LENGTH, HEADS, head_dim, dtype=dtype) for _ in range(3))
    key, value = (empty(BATCH, LENGTH, key_heads, head_dim, dtype=dtype) for _ in range(2))
    rest = (empty(HEADS), indices(BATCH, LENGTH)) if optional else ()
    inputs = Inputs(query, key, value, *rest)
    saved = (gradient, output, empty(BATCH, HEADS, LENGTH))
    forward = partial(attention_triton.forward, *inputs)
    backward = partial(attention_triton.backward, *saved, *inputs)
    shape = f"query {list(query.shape)} {dtype}, {key_heads} key heads, mask fp32, documents"
    product = TOKENS * (LENGTH + 1) * HEADS * head_dim
    return (
        Launch(f"{name}.forward", "forward_kernel", forward, shape, 2 * product),
        Launch(f"{name}.backward_query", "backward_query_kernel", backward, shape, 3 * product),
        Launch(f"{name}.backward_key", "backward_key_kernel", backward, shape, 4 * product),
    )


def attentions(**options: Any) -> Launches:
    """`attention`, and the kernel that depends on key heads with those of Llama 3 8B (arXiv
    2407.21783, table 3)."""
    grouped = attention("grouped_attention", key_heads=8, **options)
    return (*attention(**options), grouped[-1])


def cross_entropy(
    vocabulary: int = VOCABULARY, *, teacher: bool = False, dtype: str = "bf16"
) -> Launches:
    """Of one chunk of logits."""
    tokens = default_chunk(TOKENS, (2 if teacher else 1) * vocabulary, "cuda")
    logits, others = (empty(tokens, vocabulary, dtype=dtype) for _ in range(2))
    rest = (others if teacher else None, 0.5, 2.0)
    call = partial(cross_entropy_triton.forward, logits, indices(tokens), empty(tokens), *rest)
    shape = f"logits [{tokens}, {vocabulary}] {dtype}"
    if not teacher:
        kernel = "row_kernel" if vocabulary <= cross_entropy_triton._ROW else "walk_kernel"
        return (Launch("cross_entropy.forward", kernel, call, shape),)
    words = f"student's and teacher's {shape}, of which the second reading counts as the L2 cache's"
    return (Launch("distillation.forward", "walk_kernel", call, words),)


def gather_scale(
    height: int = WIDTH,
    width: int = CHANNELS,
    *,
    columns: bool = False,
    dtype: str = "bf16",
    summed: bool = False,
) -> Launches:
    """All rows by index, all columns as they are unless asked for by index too; both scales.
    `summed`: the gradient is the sum of several passes, in the wide dtype."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    weight = empty(height, width, dtype=dtype)
    gradient = empty(height, width, dtype=wide if summed else dtype)
    rows, row_scale = indices(height), empty(height, dtype=wide)
    column_index, column_scale = indices(width) if columns else None, empty(width, dtype=wide)
    selection = Selection(weight, rows, row_scale, column_index, column_scale)
    forward = partial(gather_scale_triton.forward, selection)
    backward = partial(gather_scale_triton.backward, gradient, selection, True, True, True)
    shape = f"weight [{height}, {width}] {dtype}, all {height} rows by index, both scales {wide}"
    return (
        Launch("gather_scale.forward", "forward_kernel", forward, shape),
        Launch("gather_scale.backward", "backward_kernel", backward, shape),
    )


def rms_norm(width: int = WIDTH, *, dtype: str = "bf16", optional: bool = True) -> Launches:
    """With residual and scale, or without what is optional."""
    x, other, gradient = (empty(TOKENS, width, dtype=dtype) for _ in range(3))
    gain, scale = empty(width, dtype=dtype), empty()
    second, factor = (other, scale) if optional else (None, None)
    forward = partial(rms_norm_triton.forward, x, gain, second, factor, EPS)
    saved = (gradient, second, x, empty(TOKENS), gain, factor)
    backward = partial(rms_norm_triton.backward, *saved)
    rows = f"[{TOKENS}, {width}] {dtype}"
    return (
        Launch("rms_norm.forward", "forward_kernel", forward, f"x and residual {rows}"),
        Launch("rms_norm.backward", "backward_kernel", backward, f"gradients of both {rows}"),
    )


def rope(head_dim: int = HEAD_DIM, *, rotary_dim: int = HEAD_DIM, dtype: str = "bf16") -> Launches:
    query, key = (empty(BATCH, LENGTH, HEADS, head_dim, dtype=dtype) for _ in range(2))
    cos, sin = (empty(LENGTH, rotary_dim // 2, dtype=dtype) for _ in range(2))
    forward, backward = (
        partial(rope_triton.forward, query, key, cos, sin, inverse) for inverse in (False, True)
    )
    shape = f"query and key {list(query.shape)} {dtype}, cos and sin {list(cos.shape)}"
    return (
        Launch("rope.forward", "rotate_kernel", forward, shape),
        Launch("rope.backward", "rotate_kernel", backward, shape),
    )


def swiglu(channels: int = CHANNELS, *, dtype: str = "bf16") -> Launches:
    gate, up, gradient = (empty(TOKENS, channels, dtype=dtype) for _ in range(3))
    forward = partial(swiglu_triton.forward, gate, up)
    backward = partial(swiglu_triton.backward, gradient, gate, up)
    shape = f"gate and up [{TOKENS}, {channels}] {dtype}"
    return (
        Launch("swiglu.forward", "forward_kernel", forward, shape),
        Launch("swiglu.backward", "backward_kernel", backward, shape),
    )


def launches() -> Launches:
    """Every kernel of every operator."""
    losses = (*cross_entropy(), *cross_entropy(teacher=True))
    return (*attentions(), *losses, *gather_scale(), *rms_norm(), *rope(), *swiglu())
