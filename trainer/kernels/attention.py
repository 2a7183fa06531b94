"""Causal attention with a mask per head, grouped keys, windows, and documents that share a row.

O_h = z_h * softmax(scale * Q_h K^T) V (arXiv 1706.03762, equation 1), over the keys that a query
sees. `shorn::attention` and `shorn::attention_backward` are PyTorch operators for the Triton
kernels, the portable path; on a GPU without them asked for, FlashAttention or PyTorch's own fused
attention runs, and the mask scales its output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels import attention_flash, registry
from trainer.kernels.arguments import check_like, check_rows, refuse, wide_dtype

NAME = "attention"
LARGEST_HEAD_DIM = 256
"""Channels of a head that the Triton kernels hold at once."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    head_mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Masked causal attention. Query i sees the keys j of its document with i - window < j <= i.

    Args:
        query: [B, S, H, D], fp64, fp32, bf16 or fp16, contiguous in D.
        key: [B, S, G, D] in query's dtype, contiguous in D; G divides H, and query head h reads key
            head h // (H / G).
        value: as `key`.
        head_mask: [H], fp64 when query is and fp32 otherwise; multiplies the output. Where it is 0,
            its gradient is 0 by definition (the slope of the clip that made it 0), so that nothing
            has to be computed for the head; elsewhere the kernels find it from the rounded output,
            which in fp16 loses it for masks below 1e-4. None: ones.
        documents: [B, S] int32 or int64; a document ends where the value changes. None: one each.
        window: positions that a query sees, itself included; None: all.
        scale: of the scores, above 0; None: 1 / sqrt(D).

    Returns:
        [B, S, H, D] in query's dtype.

    Raises:
        ValueError: a shape, dtype, stride, device or number does not fit.
    """
    arguments = (query, key, value, head_mask, documents, window, scale)
    if registry.runs_reference(NAME, query.device):
        return reference(*arguments)
    backend = registry.which(NAME, query.device)
    fused = backend in registry.FUSED
    asked = backend == "flash" and documents is None
    library = attention_flash.find(query) if asked else None
    if library is not None:
        _check(*arguments)
        context = attention_flash.attend(library, query, key, value, window, _scale(query, scale))
        return _mask_heads(context, head_mask)
    kernels = registry.has_kernels(NAME, query.device)
    # PyTorch's own attention needs a mask of all pairs of positions for these, Triton's none.
    limited = documents is not None or (window is not None and window < query.shape[1])
    if (kernels and not kernels_support(query)) or (fused and not (limited and kernels)):
        return reference(*arguments)
    result: Tensor = torch.ops.shorn.attention(*arguments)[0]
    return result


def kernels_support(query: Tensor) -> bool:
    """Whether the Triton kernels compute attention of these queries."""
    return (
        query.dtype != torch.float64 and query.shape[-1] <= LARGEST_HEAD_DIM and query.numel() > 0
    )


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """`attention` in PyTorch operations, with its fused attention."""
    _check(query, key, value, head_mask, documents, window, scale)
    visible = _visible(query, documents, window)
    context = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return _mask_heads(context.transpose(1, 2), head_mask)


def first_keys(query: Tensor, documents: Tensor | None, window: int | None) -> Tensor | None:
    """[B, S] int32, the first key that each query sees, never decreasing; None: 0 everywhere."""
    first = _first_keys(query, documents, window)
    return None if first is None else first.expand(query.shape[:2]).contiguous()


def _first_keys(query: Tensor, documents: Tensor | None, window: int | None) -> Tensor | None:
    """`first_keys`, [1, S] where all rows have the same."""
    length = query.shape[1]
    if window is not None and window >= length:
        window = None
    if length == 0 or (documents is None and window is None):
        return None
    position = torch.arange(length, dtype=torch.int32, device=query.device)
    first = torch.zeros_like(position).unsqueeze(0)
    if documents is not None:
        begins = (documents.diff(dim=1) != 0) * position[1:]
        first = F.pad(begins, (1, 0)).cummax(1).values
    if window is not None:
        first = torch.maximum(first, position + (1 - window))
    return first


def _visible(query: Tensor, documents: Tensor | None, window: int | None) -> Tensor | None:
    """[B or 1, 1, S, S], whether each query sees each key; None: all that come before it."""
    first = _first_keys(query, documents, window)
    if first is None:
        return None
    position = torch.arange(query.shape[1], device=query.device)
    seen = (position <= position[:, None]) & (position >= first[:, :, None])
    return seen.unsqueeze(1)


def _mask_heads(context: Tensor, head_mask: Tensor | None) -> Tensor:
    """context [B, S, H, D] times the mask, whose gradient is 0 where it is 0."""
    if head_mask is None:
        return context
    scale = head_mask.masked_fill(head_mask == 0, 0.0).unsqueeze(1)
    return (context.to(scale.dtype) * scale).to(context.dtype)


def _scale(query: Tensor, scale: float | None) -> float:
    return float(query.shape[-1] ** -0.5) if scale is None else scale


def _softmax(
    query: Tensor, key: Tensor, documents: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights [B, H, S, S] and logsumexp [B, H, S] of queries and keys [B, H, S, D]."""
    scores = query @ key.mT * scale
    visible = _visible(query.transpose(1, 2), documents, window)
    if visible is None:
        visible = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, S, G, D] -> [B, heads, S, D] in the wide dtype, each head repeated for its group."""
    wide = x.to(wide_dtype(x)).transpose(1, 2)
    return wide.repeat_interleave(heads // x.shape[2], 1)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D] and logsumexp [B, H, S] in the wide dtype, 0 of heads with mask 0."""
    _check(query, key, value, head_mask, documents, window, scale)
    factor = _scale(query, scale)
    module = registry.triton_module(NAME, query.device)
    if module is not None and kernels_support(query):
        found: tuple[Tensor, Tensor] = module.forward(
            query, key, value, head_mask, documents, window, factor
        )
        return found
    queries, keys, values = (_by_head(x, query.shape[2]) for x in (query, key, value))
    weights, logsumexp = _softmax(queries, keys, documents, window, factor)
    context = weights @ values
    if head_mask is not None:
        context = context * head_mask[:, None, None]
        logsumexp = logsumexp.masked_fill((head_mask == 0)[:, None], 0.0)
    return context.transpose(1, 2).to(query.dtype).contiguous(), logsumexp


def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and the mask (empty [0] without one)."""
    check_like(NAME, "gradient", gradient, tuple(query.shape), (query.dtype,), query.device)
    check_rows(NAME, "gradient", gradient)
    factor = _scale(query, scale)
    module = registry.triton_module(NAME, query.device)
    if module is not None and kernels_support(query):
        saved = (query, key, value, head_mask, documents, output, logsumexp)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = module.backward(
            gradient, *saved, window, factor
        )
        return found
    heads = query.shape[2]
    queries, keys, values, outer = (_by_head(x, heads) for x in (query, key, value, gradient))
    weights, _ = _softmax(queries, keys, documents, window, factor)
    d_mask = queries.new_empty(0)
    if head_mask is not None:
        d_mask = (outer * (weights @ values)).sum((0, 2, 3)).masked_fill(head_mask == 0, 0.0)
        outer = outer * head_mask[:, None, None]
    d_weights = outer @ values.mT
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * factor
    d_heads = (d_scores @ keys, d_scores.mT @ queries, weights.mT @ outer)
    d_query, d_key, d_value = (
        x.unflatten(1, (like.shape[2], -1)).sum(2).transpose(1, 2).to(like.dtype).contiguous()
        for x, like in zip(d_heads, (query, key, value), strict=True)
    )
    return d_query, d_key, d_value, d_mask


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float | None,
) -> None:
    check_rows(NAME, "query", query, 4)
    batch, length, heads, head_dim = query.shape
    if head_dim == 0:
        refuse(NAME, "query", "at least 1 wide", query)
    key_heads = key.shape[2] if key.dim() == 4 else 1
    for name, tensor in (("key", key), ("value", value)):
        shape = (batch, length, key_heads, head_dim)
        check_like(NAME, name, tensor, shape, (query.dtype,), query.device)
        check_rows(NAME, name, tensor)
    if key_heads == 0 or heads % key_heads:
        refuse(NAME, "key", f"of a number of heads that divides query's {heads}", key)
    check_like(NAME, "head_mask", head_mask, (heads,), (wide_dtype(query),), query.device)
    integers = (torch.int32, torch.int64)
    check_like(NAME, "documents", documents, (batch, length), integers, query.device)
    if window is not None and window < 1:
        refuse(NAME, "window", "at least 1", window)
    if scale is not None and not 0 < scale < float("inf"):
        refuse(NAME, "scale", "above 0 and finite", scale)


def _fake_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, head_mask, documents, window, scale)
    batch, length, heads, _ = query.shape
    logsumexp = query.new_empty((batch, heads, length), dtype=wide_dtype(query))
    return query.new_empty(query.shape), logsumexp


def _fake_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    documents: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_mask = query.new_empty(0 if head_mask is None else query.shape[2], dtype=wide_dtype(query))
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    return d_query, d_key, d_value, d_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.has_mask = inputs[3] is not None
    ctx.save_for_backward(*tensors, *output)


def _differentiate(
    ctx: Any, gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 7
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    d_query, d_key, d_value, d_mask = torch.ops.shorn.attention_backward(
        gradient, *ctx.saved_tensors, ctx.window, ctx.scale
    )
    return d_query, d_key, d_value, d_mask if ctx.has_mask else None, None, None, None


def _register() -> torch.library.Library:
    space = torch.library.Library("shorn", "FRAGMENT")
    tensors = "Tensor query, Tensor key, Tensor value, Tensor? head_mask, Tensor? documents"
    forward = f"attention({tensors}, int? window, float? scale) -> (Tensor, Tensor)"
    backward = (
        f"attention_backward(Tensor gradient, {tensors}, Tensor output, Tensor logsumexp, "
        "int? window, float? scale) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    registry.define(space, forward, _forward, _fake_forward)
    registry.define(space, backward, _backward, _fake_backward)
    torch.library.register_autograd(
        "shorn::attention", _differentiate, setup_context=_save, lib=space
    )
    triton = "trainer.kernels.attention_triton"
    registry.register(registry.Operator(NAME, reference, triton, fused=attention_flash.backend))
    return space


_SPACE = _register()
