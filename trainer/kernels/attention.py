"""Causal attention with a mask per head, grouped keys, windows, and documents that share a row.

O_h = z_h * softmax(scale * Q_h K^T) V (arXiv 1706.03762, equation 1), over the keys that a query
sees. `shorn::attention` and `shorn::attention_backward` are PyTorch operators that run the Triton
kernels, the portable path. On a GPU without them asked for, FlashAttention or PyTorch's own fused
attention runs, and the mask scales its output.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from trainer.kernels import attention_flash, registry
from trainer.kernels.arguments import check_like, check_rows, refuse, wide_dtype

NAME = "attention"


class Inputs(NamedTuple):
    """Arguments of `attention`, as its operators take them too."""

    query: Tensor
    key: Tensor
    value: Tensor
    head_mask: Tensor | None = None
    documents: Tensor | None = None
    window: int | None = None
    scale: float | None = None


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
    inputs = Inputs(query, key, value, head_mask, documents, window, scale)
    if registry.runs_reference(NAME, query.device):
        return reference(inputs)
    backend = registry.which(NAME, query.device)
    asked = backend == "flash" and documents is None
    library = attention_flash.find(query) if asked else None
    if library is not None:
        _check(inputs)
        context = attention_flash.attend(
            library, query, key, value, window, score_scale(query, scale)
        )
        return _mask_heads(context, head_mask)
    # PyTorch's own attention needs a mask of all pairs of positions for these, Triton's none.
    limited = documents is not None or (window is not None and window < query.shape[1])
    fused = backend in registry.FUSED and not limited
    if fused or not registry.runs_kernels(NAME, query):
        return reference(inputs)
    result: Tensor = torch.ops.shorn.attention(*inputs)[0]
    return result


def reference(inputs: Inputs) -> Tensor:
    """`attention` in PyTorch operations, with its fused attention."""
    _check(inputs)
    query, key, value, head_mask, documents, window, scale = inputs
    # Where documents end, a GPU would have to be waited for to tell, and a traced call cannot know.
    known = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if documents is not None and query.numel() and known:
        return _one_by_one(inputs, documents)
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


def _one_by_one(inputs: Inputs, documents: Tensor) -> Tensor:
    """`reference`, of each document alone: as much less work as documents are shorter than rows."""
    query, key, value, head_mask, _, window, scale = inputs
    batch, length = documents.shape
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff(dim=1) != 0
    starts = begins.flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in pairwise([*starts, batch * length])]
    # The gradient of a split is one copy; that of a slice is a whole row for each.
    parts = [x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x in (query, key, value)]
    found = [
        reference(Inputs(q, k, v, head_mask, None, window, scale))
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=1).view(query.shape)


def sdpa_backend(device: torch.device) -> str:
    """Which of its own implementations PyTorch takes on a GPU for bf16 queries 128 wide: "cudnn",
    "flash", "efficient" or "math"; "unknown" where it does not tell."""
    query = torch.zeros(1, 256, 2, 128, dtype=torch.bfloat16, device=device).transpose(1, 2)
    query.requires_grad_()
    # No public function tells.
    choose = getattr(torch, "_fused_sdp_choice", None)
    try:
        found = SDPBackend(choose(query, query, query, is_causal=True) if choose else -1)
    except (RuntimeError, TypeError, ValueError):
        found = SDPBackend.ERROR
    known = {SDPBackend.ERROR: "unknown"}
    return known.get(found, found.name.removesuffix("_ATTENTION").lower())


def score_scale(query: Tensor, scale: float | None) -> float:
    """Factor of the scores."""
    return float(query.shape[-1] ** -0.5) if scale is None else scale


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


def _check(inputs: Inputs) -> None:
    query, key, value, head_mask, documents, window, scale = inputs
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


def _check_backward(gradient: Tensor, output: Tensor, logsumexp: Tensor, *arguments: Any) -> None:
    query = Inputs(*arguments).query
    check_like(NAME, "gradient", gradient, tuple(query.shape), (query.dtype,), query.device)
    check_rows(NAME, "gradient", gradient)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*arguments)
    _check(inputs)
    batch, length, heads, _ = inputs.query.shape
    logsumexp = inputs.query.new_empty((batch, heads, length), dtype=torch.float32)
    return inputs.query.new_empty(inputs.query.shape), logsumexp


def _fake_backward(
    gradient: Tensor, output: Tensor, logsumexp: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    inputs = Inputs(*arguments)
    d_mask = logsumexp.new_empty(0 if inputs.head_mask is None else inputs.query.shape[2])
    return *(x.new_empty(x.shape) for x in inputs[:3]), d_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.has_mask = inputs[3] is not None
    ctx.save_for_backward(*output, *tensors)


def _differentiate(
    ctx: Any, gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * len(Inputs._fields)
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    d_query, d_key, d_value, d_mask = torch.ops.shorn.attention_backward(
        gradient, *ctx.saved_tensors, ctx.window, ctx.scale
    )
    return d_query, d_key, d_value, d_mask if ctx.has_mask else None, None, None, None


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? head_mask, Tensor? documents, int? window, "
    "float? scale"
)
registry.define(
    f"attention({_INPUTS}) -> (Tensor, Tensor)",
    registry.kernel(NAME, "forward", lambda *arguments: _check(Inputs(*arguments))),
    _fake,
    _save,
    _differentiate,
)
registry.define(
    f"attention_backward(Tensor gradient, Tensor output, Tensor logsumexp, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    registry.kernel(NAME, "backward", _check_backward),
    _fake_backward,
)
registry.register(registry.Operator(NAME, widest=256, fused=attention_flash.backend))
