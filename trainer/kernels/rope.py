"""Rotary position embedding of queries and keys, in one pass over both.

RoFormer, arXiv 2104.09864, equation 34, in Hugging Face's layout: channels i and i + r / 2 of the
first r = rotary_dim channels pair up, the rest stays. The gradient is the inverse rotation.
`shorn::rope` and `shorn::rope_` are PyTorch operators that run a Triton kernel; `rope` calls them
where the registry chose kernels.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.arguments import check_last_stride, check_like, check_rows, refuse, wide_dtype

NAME = "rope"


def rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Query and key, rotated by the angles of their positions.

    Args:
        query: [B, S, heads, head_dim], fp64, fp32, bf16 or fp16, contiguous in head_dim.
        key: [B, S, key heads, head_dim] in query's dtype, contiguous in head_dim.
        cos: [S, r / 2] with r <= head_dim, or [B, S, r / 2] where rows have positions of their own,
            contiguous in its last dimension, in query's dtype or in the one computed in (fp64 for
            fp64, else fp32). Gets no gradient.
        sin: as `cos`.
        in_place: query and key may be overwritten. Kernels do so where both are contiguous and
            nothing is recorded for a backward pass.

    Returns:
        Both rotated, contiguous, in query's dtype. Kernels compute in fp32 and round once; the
        reference rounds after every operation, as plain PyTorch does.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if not registry.runs_kernels(NAME, query):
        return reference(query, key, cos, sin)
    recorded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if in_place and not recorded and query.is_contiguous() and key.is_contiguous():
        torch.ops.shorn.rope_(query, key, cos, sin)
        return query, key
    rotated: tuple[Tensor, Tensor] = torch.ops.shorn.rope(query, key, cos, sin, False)
    return rotated


def reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` in PyTorch operations."""
    _check(query, key, cos, sin)
    cos, sin = cos.detach().unsqueeze(-2), sin.detach().unsqueeze(-2)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat([part.to(x.dtype) for part in rotated], dim=-1)


def _check(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    check_rows(NAME, "query", query, 4)
    batch, length, _, head_dim = query.shape
    heads = key.shape[2] if key.dim() == 4 else 0
    check_like(NAME, "key", key, (batch, length, heads, head_dim), (query.dtype,), query.device)
    check_rows(NAME, "key", key)
    half = cos.shape[-1] if cos.dim() in (2, 3) else 0
    if not 0 < 2 * half <= head_dim:
        refuse(NAME, "cos", f"[{length}, at most {head_dim // 2}]", cos)
    shape = (length, half) if cos.dim() == 2 else (batch, length, half)
    for name, table in (("cos", cos), ("sin", sin)):
        dtypes = (query.dtype, wide_dtype(query))
        check_like(NAME, name, table, shape, dtypes, query.device)
        check_last_stride(NAME, name, table)
    if sin.dtype != cos.dtype:
        refuse(NAME, "sin", f"{cos.dtype} as cos", sin)


def _check_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    _check(query, key, cos, sin)
    for name, tensor in (("query", query), ("key", key)):
        if not tensor.is_contiguous():
            refuse(NAME, name, "contiguous to be overwritten", f"strides {tensor.stride()}")


def _fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    _check(query, key, cos, sin)
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor | None, ...]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    return *torch.ops.shorn.rope(query, key, *ctx.saved_tensors, not ctx.inverse), None, None, None


registry.define(
    "rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    registry.kernel(NAME, "forward", _check),
    _fake,
    _save,
    _differentiate,
)
registry.define(
    "rope_(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin) -> ()",
    registry.kernel(NAME, "forward_", _check_in_place),
    _check,
)
registry.register(registry.Operator(NAME))
