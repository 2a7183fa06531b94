"""Losses of a linear head without ever holding the logits of all tokens: cross-entropy, alone or
mixed with the divergence from a teacher."""

from typing import NamedTuple

import torch
from torch import Tensor

# Defines the operator.
import trainer.kernels.linear_cross_entropy  # noqa: F401


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
        chunk_tokens: tokens per chunk; None: trainer.kernels.linear_cross_entropy.default_chunk.

    Returns:
        The scalar loss sum(token_weights * token_loss) and the detached token_loss [T] in nats,
        both fp32 (fp64 for fp64 input); token_loss is 0 where the weight is 0.

    Raises:
        ValueError: a shape, dtype, stride, device or number does not fit.
        InputError: a weighted target lies outside [0, V). Checked on the CPU only; a GPU would
            have to wait for the answer.
    """
    loss, token_loss, _ = _linear_loss(hidden, weight, targets, token_weights, None, chunk_tokens)
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
        ValueError, InputError: as linear_cross_entropy.
    """
    return _linear_loss(hidden, weight, targets, token_weights, teaching, chunk_tokens)


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    teaching: Teaching | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and per token the cross-entropy and the divergence (empty without a teacher)."""
    assert token_weights.dtype in (torch.float32, torch.float64), (
        f"token weights came as {token_weights.dtype}: under FSDP the root module needs "
        "MixedPrecisionPolicy(cast_forward_inputs=False)"
    )
    states = head_weight = None
    share, temperature, top_k = 0.0, 1.0, 0
    if teaching is not None:
        _, _, share, temperature, top_k = teaching
        states = teaching.states.detach().flatten(0, -2)
        head_weight = teaching.head_weight.detach()
    differentiate = torch.is_grad_enabled()
    loss, token_loss, token_kl, _, _ = torch.ops.shorn.linear_cross_entropy(
        hidden,
        weight,
        targets,
        token_weights,
        states,
        head_weight,
        share,
        temperature,
        top_k,
        chunk_tokens,
        differentiate and hidden.requires_grad,
        differentiate and weight.requires_grad,
    )
    return loss, token_loss, token_kl
