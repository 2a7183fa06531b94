"""Cross-entropy of a linear head without ever holding the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.errors import InputError

LOGITS_BYTES = 64 * 2**20
"""Size of one chunk of fp32 logits, in bytes."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of softmax(hidden weight^T), and each token's.

    Gradients are computed in the forward pass, chunk by chunk: the loss is linear in known weights,
    so the logits are needed once and no product is done twice (the method of Liger, arXiv
    2410.10989, section 3.2, here with per-token weights). Softmax and accumulation are in fp32 (or
    fp64 for fp64 input). The result can be differentiated once.

    Args:
        hidden: [T, d] inputs of the head.
        weight: [V, d] weight of the head, same dtype.
        targets: [T] class ids; any value where the token's weight is 0.
        token_weights: [T] fp32 (or fp64) weight of each token, not differentiated.
        chunk_tokens: tokens per chunk; by default as many as give LOGITS_BYTES of fp32 logits.

    Returns:
        The scalar loss sum(token_weights * token_loss) and the detached token_loss [T] in nats,
        both fp32 (fp64 for fp64 input); token_loss is 0 where the weight is 0.

    Raises:
        InputError: a weighted target lies outside [0, V). Checked on the CPU only; a GPU would
            have to wait for the answer.
    """
    assert token_weights.dtype in (torch.float32, torch.float64), (
        f"token weights came as {token_weights.dtype}: under FSDP the root module needs "
        "MixedPrecisionPolicy(cast_forward_inputs=False)"
    )
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(weight.shape[0])
    ignored = token_weights == 0
    targets = targets.masked_fill(ignored, 0)
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise InputError(
                f"target id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{weight.shape[0]}; tokenize the data with the model's own tokenizer"
            )
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, targets, token_weights, ignored, chunk_tokens)
    if not differentiate:
        token_loss = _token_losses(*arguments)
        return torch.dot(token_loss, token_weights.to(token_loss.dtype)), token_loss
    loss, token_loss = _LinearCrossEntropy.apply(*arguments)
    return loss, token_loss


def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    ignored: Tensor,
    chunk_tokens: int,
) -> Tensor:
    losses = token_weights.new_empty(targets.shape, dtype=_accumulation_dtype(hidden))
    for start in range(0, len(targets), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = (hidden[part] @ weight.t()).to(losses.dtype)
        chosen = logits.gather(1, targets[part, None]).squeeze(1)
        losses[part] = logits.logsumexp(1) - chosen
    return losses.masked_fill_(ignored, 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        ignored: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        accumulation = _accumulation_dtype(hidden)
        token_weights = token_weights.to(accumulation)
        losses = torch.empty_like(token_weights)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = hidden[part] @ weight.t()
            losses[part], gradient = _softmax_gradient(logits, targets[part], token_weights[part])
            del logits
            gradient = gradient.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[part])
            if needs_weight:
                d_weight = _add_product(d_weight, gradient.t(), hidden[part], accumulation)
        losses.masked_fill_(ignored, 0)
        ctx.gradients = (d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, token_weights), losses

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_loss: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        assert ctx.gradients is not None, "linear_cross_entropy was differentiated a second time"
        d_hidden, d_weight = ctx.gradients
        # Scaled in place: at a large vocabulary d_weight is the largest tensor of the step.
        ctx.gradients = None
        if d_hidden is not None:
            d_hidden.mul_(d_loss)
        if d_weight is not None:
            d_weight = d_weight.mul_(d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def _softmax_gradient(
    logits: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Token losses [t] and d(sum of weighted losses) / d logits [t, V], in token_weights' dtype."""
    targets = targets.unsqueeze(1)
    top, position = logits.max(dim=1, keepdim=True)
    chosen = logits.gather(1, targets)
    probabilities = torch.softmax(logits, dim=1, dtype=token_weights.dtype)
    # The largest probability is at least 1/V, so its logarithm is exact where the target's is not.
    log_sum = top.to(token_weights.dtype) - probabilities.gather(1, position).log()
    losses = (log_sum - chosen).squeeze(1)
    scale = token_weights.unsqueeze(1)
    probabilities.mul_(scale)
    probabilities.scatter_add_(1, targets, -scale)
    return losses, probabilities


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, in place; None counts as zeros that nobody has to write."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


def _default_chunk(classes: int) -> int:
    """Tokens whose fp32 logits fill LOGITS_BYTES; a multiple of 64 suits matrix units."""
    tokens = max(1, LOGITS_BYTES // (4 * classes))
    return tokens // 64 * 64 or tokens


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
