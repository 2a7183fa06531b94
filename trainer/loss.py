"""Losses of a linear head without ever holding the logits of all tokens: cross-entropy, alone or
mixed with the divergence from a teacher."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.errors import InputError

LOGITS_BYTES = 64 * 2**20
"""Size of one chunk of fp32 logits in bytes, a teacher's included."""


class Teaching(NamedTuple):
    """What a frozen teacher says about the tokens of a forward pass, and how much that counts."""

    states: Tensor
    """[..., d_t] outputs of the teacher's final norm; leading sizes as the student's tokens."""
    head_weight: Tensor
    """[V, d_t] weight of the teacher's head, same dtype."""
    share: float
    """Weight of the divergence, 0 to 1; the cross-entropy has the rest."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence."""
    top_k: int = 0
    """Ids per token over which the divergence is taken: the teacher's likeliest; 0 for all."""


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
    targets, ignored = _checked(targets, token_weights, weight.shape[0])
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(weight.shape[0])
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, targets, token_weights, ignored, chunk_tokens)
    if not differentiate:
        token_loss = _token_losses(*arguments)
        return torch.dot(token_loss, token_weights.to(token_loss.dtype)), token_loss
    loss, token_loss, _ = _LinearLoss.apply(*arguments, None)
    return loss, token_loss


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    teaching: Teaching,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over tokens of (1 - a) * cross-entropy + a * T^2 * KL(teacher || student).

    a is `teaching.share`, T its temperature: both models' logits are divided by T before the
    softmax of the divergence, and T^2 keeps its gradient's size independent of T (Hinton et al.,
    arXiv 1503.02531, section 2). With `teaching.top_k` = K > 0 both distributions are those over
    the teacher's K likeliest ids, renormalised: the divergence then says nothing about the
    probability of the other ids, the cross-entropy still does. One pass serves both terms: as in
    linear_cross_entropy, gradients are computed chunk by chunk in the forward pass, and logits,
    the student's and the teacher's, exist for one chunk at a time. The teacher gets no gradients.

    Args:
        hidden, weight, targets, token_weights, chunk_tokens: as for linear_cross_entropy.
        teaching: the teacher's states [..., d_t] for the same tokens, and its head [V, d_t].

    Returns:
        The scalar loss, and per token [T], detached, in nats and 0 where the weight is 0: the
        cross-entropy and the divergence (without the factor T^2). dtypes as linear_cross_entropy.

    Raises:
        InputError: as linear_cross_entropy.
    """
    targets, ignored = _checked(targets, token_weights, weight.shape[0])
    states = teaching.states.detach().flatten(0, -2)
    head_weight = teaching.head_weight.detach()
    assert head_weight.shape[0] == weight.shape[0], (head_weight.shape, weight.shape)
    assert len(states) == len(hidden), (states.shape, hidden.shape)
    assert 0 <= teaching.top_k <= weight.shape[0], teaching.top_k
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(2 * weight.shape[0])
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    teaching = teaching._replace(states=states, head_weight=head_weight)
    loss, token_loss, token_kl = _LinearLoss.apply(
        hidden, weight, targets, token_weights, ignored, chunk_tokens, teaching
    )
    return loss, token_loss, token_kl


def _checked(targets: Tensor, token_weights: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Targets with 0 for those that do not count, and which these are."""
    assert token_weights.dtype in (torch.float32, torch.float64), (
        f"token weights came as {token_weights.dtype}: under FSDP the root module needs "
        "MixedPrecisionPolicy(cast_forward_inputs=False)"
    )
    ignored = token_weights == 0
    targets = targets.masked_fill(ignored, 0)
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"target id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{classes}; tokenize the data with the model's own tokenizer"
            )
    return targets, ignored


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


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        ignored: Tensor,
        chunk_tokens: int,
        teaching: Teaching | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        accumulation = _accumulation_dtype(hidden)
        token_weights = token_weights.to(accumulation)
        losses = torch.empty_like(token_weights)
        divergences = None if teaching is None else torch.empty_like(token_weights)
        share = 0.0 if teaching is None else teaching.share
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = hidden[part] @ weight.t()
            scale = token_weights[part] * (1 - share)
            losses[part], gradient = _softmax_gradient(logits, targets[part], scale)
            if teaching is not None and divergences is not None:
                divergences[part] = _add_divergence(
                    gradient, logits, token_weights[part], teaching, part
                )
            del logits
            gradient = gradient.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[part])
            if needs_weight:
                d_weight = _add_product(d_weight, gradient.t(), hidden[part], accumulation)
        losses.masked_fill_(ignored, 0)
        ctx.gradients = (d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        loss = torch.dot(losses, token_weights)
        if teaching is None or divergences is None:
            ctx.mark_non_differentiable(losses)
            return loss, losses, None
        divergences.masked_fill_(ignored, 0)
        ctx.mark_non_differentiable(losses, divergences)
        factor = share * teaching.temperature**2
        loss = (1 - share) * loss + factor * torch.dot(divergences, token_weights)
        return loss, losses, divergences

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_loss: Tensor, *_: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        assert ctx.gradients is not None, "a linear loss was differentiated a second time"
        d_hidden, d_weight = ctx.gradients
        # Scaled in place: at a large vocabulary d_weight is the largest tensor of the step.
        ctx.gradients = None
        if d_hidden is not None:
            d_hidden.mul_(d_loss)
        if d_weight is not None:
            d_weight = d_weight.mul_(d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None


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


def _add_divergence(
    gradient: Tensor, logits: Tensor, token_weights: Tensor, teaching: Teaching, part: slice
) -> Tensor:
    """KL(teacher || student) [t] of the tokens `part`; adds its weighted gradient, by the student's
    logits [t, V], to `gradient`."""
    taught = teaching.states[part] @ teaching.head_weight.t()
    ids = None
    if teaching.top_k:
        taught, ids = taught.topk(teaching.top_k, dim=1, sorted=False)
        logits = logits.gather(1, ids)
    teacher = _log_probabilities(taught, teaching.temperature, gradient.dtype)
    del taught
    student = _log_probabilities(logits, teaching.temperature, gradient.dtype)
    probabilities = teacher.exp()
    divergences = teacher.sub_(student).mul_(probabilities).sum(dim=1)
    # T^2 of the loss times the 1/T of the logits' scaling.
    scale = teaching.share * teaching.temperature * token_weights
    difference = student.exp_().sub_(probabilities).mul_(scale.unsqueeze(1))
    if ids is None:
        gradient.add_(difference)
    else:
        gradient.scatter_add_(1, ids, difference)
    return divergences


def _log_probabilities(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log softmax(logits / temperature) [t, K] in `dtype`."""
    scaled = logits if temperature == 1 else logits.to(dtype) / temperature
    return torch.log_softmax(scaled, dim=1, dtype=dtype)


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
