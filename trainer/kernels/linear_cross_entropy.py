"""A linear head and its loss as one operator that never holds the logits of all tokens.

The loss is linear in weights that are known beforehand, so that gradients are computed in the
forward pass, chunk by chunk, and no product is done twice (Liger, arXiv 2410.10989, section 3.2).
`shorn::linear_cross_entropy` returns them as results beside the loss; its backward pass only scales
them. To torch.compile, FSDP and checkpointing it is one operator. Matrix products are PyTorch's;
what happens between them is `cross_entropy_`, whose implementation the registry chooses.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.errors import InputError
from trainer.kernels import registry
from trainer.kernels.arguments import check_like, check_rows, refuse, wide_dtype
from trainer.kernels.cross_entropy import cross_entropy_, divergence, divergence_scale

NAME = "linear_cross_entropy"

LOGITS_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Size of one chunk of logits in bytes, if they were fp32, a teacher's included; more where 256
tokens take more."""
_FEWEST_TOKENS, _MOST_TOKENS = 256, 2048
_WEIGHTS = (torch.float32, torch.float64)

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """Arguments of the operator: a student's tokens, what a teacher says, and what is wanted."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor
    states: Tensor | None
    head_weight: Tensor | None
    alpha: float
    temperature: float
    top_k: int
    chunk_tokens: int | None
    needs_hidden: bool
    needs_weight: bool


def default_chunk(tokens: int, classes: int, device: str = "cpu") -> int:
    """Tokens per chunk of `tokens` for a head of `classes` rows (a teacher doubles them).

    Their logits fill at most LOGITS_BYTES, and on a CPU at most an eighth of the memory of all
    logits, unless that makes matrix products of few rows. A multiple of 64 suits matrix units.
    Every chunk reads and writes the head's gradient, 8 bytes for each weight beside 6 operations
    of each token: at 3 TB/s and 600 Tflop/s, an eighth of the products' time for 2,048 tokens and
    a half for 512. More than 2,048 gain little.
    """
    most = _MOST_TOKENS if device == "cuda" else tokens // 8
    chunk = min(LOGITS_BYTES.get(device, LOGITS_BYTES["cpu"]) // (4 * max(1, classes)), most)
    return max(_FEWEST_TOKENS, chunk // 64 * 64)


def _run(*arguments: Any) -> Results:
    """The loss [], cross-entropies [T] and divergences [T] (empty [0] without a teacher), and the
    loss's gradients by hidden [T, d] and weight [V, d] (empty [0] where they are not needed)."""
    inputs = Inputs(*arguments)
    _, losses, divergences, d_hidden, d_weight = _allocate(*inputs)
    hidden, weight, _, _, states, head_weight, *_ = inputs
    ignored = inputs.token_weights == 0
    targets = inputs.targets.masked_fill(ignored, 0)
    token_weights = inputs.token_weights.to(losses.dtype)
    _check_targets(targets, len(weight))
    chunk = inputs.chunk_tokens or _chunk_tokens(len(targets), weight, states)
    shape = min(chunk, len(targets)), len(weight)
    buffer = hidden.new_empty(shape)
    teacher_buffer = None if states is None else states.new_empty(shape)
    # Once without tokens too: the gradient by the weight is then zeros.
    for start in range(0, len(targets) or 1, chunk):
        part = slice(start, start + chunk)
        count = len(targets[part])
        logits = torch.mm(hidden[part], weight.t(), out=buffer[:count])
        teacher_logits = None
        if states is not None and head_weight is not None and teacher_buffer is not None:
            teacher_logits = torch.mm(states[part], head_weight.t(), out=teacher_buffer[:count])
        tokens = (logits, targets[part], token_weights[part])
        losses[part], divergences[part] = _to_gradient(*tokens, teacher_logits, inputs)
        if inputs.needs_hidden:
            torch.mm(logits, weight, out=d_hidden[part])
        if inputs.needs_weight:
            _add_product(d_weight, logits.t(), hidden[part], first=start == 0)
    divergences.masked_fill_(ignored[: len(divergences)], 0)
    loss = (1 - inputs.alpha) * torch.dot(losses, token_weights)
    if states is not None:
        factor = inputs.alpha * inputs.temperature**2
        loss = loss + factor * torch.dot(divergences, token_weights)
    return loss, losses, divergences, d_hidden, d_weight


def _chunk_tokens(tokens: int, weight: Tensor, states: Tensor | None) -> int:
    """`default_chunk` for what runs on the weight's device."""
    classes = len(weight) * (1 if states is None else 2)
    # Where a GPU runs no kernel there are copies of the logits in fp32: chunks stay small.
    plain = registry.runs_reference("cross_entropy", weight.device)
    return default_chunk(tokens, classes, "cpu" if plain else weight.device.type)


def _to_gradient(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    teacher_logits: Tensor | None,
    inputs: Inputs,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_`, with the divergence over the teacher's `top_k` likeliest ids and all others
    as one outcome; over all ids where `top_k` is 0, or leaves no others."""
    alpha, temperature, top_k = inputs.alpha, inputs.temperature, inputs.top_k
    tokens = (logits, targets, token_weights)
    if teacher_logits is None or top_k in (0, logits.shape[1]):
        return cross_entropy_(*tokens, teacher_logits, alpha, temperature)
    ids = teacher_logits.topk(top_k, dim=1, sorted=False).indices
    teacher, _ = _outcomes(teacher_logits, ids, temperature)
    student, others = _outcomes(logits, ids, temperature)
    divergences, difference = divergence(student, teacher, 1.0)
    # By the logit of one of the others: what the outcome gets, times the id's share in it.
    shares = others.sub_(student[:, top_k:]).exp_().mul_(difference[:, top_k:])
    gradient = shares.scatter_(1, ids, difference[:, :top_k])
    losses, _ = cross_entropy_(*tokens, None, alpha, temperature)
    scale = divergence_scale(token_weights, alpha, temperature)
    logits.add_(gradient.mul_(scale).to(logits.dtype))
    return losses, divergences


def _outcomes(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of logits [t, V]: those of `ids` [t, K] and, behind them, the logarithm of what all others
    add up to, [t, K + 1]; and the others', [t, V] with -inf at `ids`. All divided by the
    temperature, in the wide dtype."""
    others = logits.to(wide_dtype(logits), copy=True).div_(temperature)
    likeliest = others.gather(1, ids)
    others.scatter_(1, ids, -torch.inf)
    return torch.cat([likeliest, others.logsumexp(1, keepdim=True)], dim=1), others


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right in total's dtype; the first product replaces what is there."""
    beta = 0 if first else 1
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
    elif adds_to(total.dtype, left.dtype, total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


@functools.cache
def adds_to(total: torch.dtype, factor: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products of `factor` can add to a matrix in the wider dtype `total`.

    CUDA's can, in versions of PyTorch that do it right; asked of the device itself.
    """
    try:
        ones = torch.ones(16, 16, dtype=factor, device=device)
        # What 16 is added to here has more digits than a 16-bit number.
        sums = torch.full((16, 16), 4097.0, dtype=total, device=device)
        torch.addmm(sums, ones, ones, out_dtype=total, out=sums)
        return bool((sums == 4113).all())
    except RuntimeError:
        return False


def _check_targets(targets: Tensor, classes: int) -> None:
    if targets.device.type == "cpu" and targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise InputError(
                f"target id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{classes}; tokenize the data with the model's own tokenizer"
            )


def _check(inputs: Inputs) -> None:
    hidden, weight, _, _, states, head_weight, *_ = inputs
    check_rows(NAME, "hidden", hidden, 2)
    (tokens, width), dtypes, device = hidden.shape, (hidden.dtype,), hidden.device
    classes = weight.shape[0] if weight.dim() else 0
    check_like(NAME, "weight", weight, (classes, width), dtypes, device)
    check_rows(NAME, "weight", weight)
    check_like(NAME, "targets", inputs.targets, (tokens,), (torch.int64,), device)
    check_like(NAME, "token_weights", inputs.token_weights, (tokens,), _WEIGHTS, device)
    if states is not None and head_weight is not None:
        width = states.shape[1] if states.dim() == 2 else 0
        check_like(NAME, "states", states, (tokens, width), dtypes, device)
        check_like(NAME, "head_weight", head_weight, (classes, width), dtypes, device)
    if not 0 <= inputs.alpha <= 1:
        refuse(NAME, "alpha", "in [0, 1]", inputs.alpha)
    if not 0 < inputs.temperature < float("inf"):
        refuse(NAME, "temperature", "above 0 and finite", inputs.temperature)
    if not 0 <= inputs.top_k <= classes:
        refuse(NAME, "top_k", f"in [0, {classes}]", inputs.top_k)
    if inputs.chunk_tokens is not None and inputs.chunk_tokens < 1:
        refuse(NAME, "chunk_tokens", "at least 1", inputs.chunk_tokens)


def _allocate(*arguments: Any) -> Results:
    """Memory for the results of `_run`, or their shapes. Checks all arguments."""
    inputs = Inputs(*arguments)
    _check(inputs)
    hidden, weight = inputs.hidden, inputs.weight
    tokens, dtype = inputs.targets.shape[0], wide_dtype(hidden)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(tokens, dtype=dtype),
        hidden.new_empty(0 if inputs.states is None else tokens, dtype=dtype),
        hidden.new_empty(hidden.shape if inputs.needs_hidden else 0),
        weight.new_empty(weight.shape if inputs.needs_weight else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.needs = inputs[-2:]
    ctx.weight_dtype = inputs[1].dtype


@once_differentiable
def _differentiate(ctx: Any, d_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs_hidden, needs_weight = ctx.needs
    d_hidden, d_weight = ctx.saved_tensors
    return (
        _scale(d_hidden, d_loss) if needs_hidden else None,
        _scale(d_weight, d_loss).to(ctx.weight_dtype) if needs_weight else None,
        *[None] * (len(Inputs._fields) - 2),
    )


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    # In place: at a large vocabulary this is the largest tensor of the step. What torch.compile
    # traces must not change results of the forward pass, and is given memory by it.
    return gradient.mul_(factor) if type(gradient) is Tensor else gradient * factor


registry.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor token_weights, "
    "Tensor? states, Tensor? head_weight, float alpha, float temperature, int top_k, "
    "int? chunk_tokens, bool needs_hidden, bool needs_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _allocate,
    _save,
    _differentiate,
)


class TeacherOutput(NamedTuple):
    """What a frozen teacher says about the tokens of a forward pass, and how much that counts."""

    states: Tensor
    """[..., d_t] outputs of the teacher's final norm; leading sizes as the student's tokens."""
    head_weight: Tensor
    """[V, d_t] weight of the teacher's head, same dtype."""
    alpha: float
    """Weight of the divergence, 0 to 1; the cross-entropy has the rest."""
    temperature: float = 1.0
    """Divides both models' logits in the divergence."""
    top_k: int = 0
    """Ids per token that the divergence tells apart: the teacher's likeliest; 0 for all."""


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
    teacher_output: TeacherOutput,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum over tokens of (1 - a) * cross-entropy + a * T^2 * KL(teacher || student).

    a is `teacher_output.alpha`, T its temperature: both models' logits are divided by T before the
    softmax of the divergence, and T^2 keeps its gradient's size independent of T (Hinton et al.,
    arXiv 1503.02531, section 2). With `teacher_output.top_k` = K > 0 the distributions have K + 1
    outcomes: the teacher's K likeliest ids, and any other id. One pass serves both terms: as in
    linear_cross_entropy, gradients are computed chunk by chunk in the forward pass, and logits,
    the student's and the teacher's, exist for one chunk at a time. The teacher gets no gradients.

    Args:
        hidden, weight, targets, token_weights, chunk_tokens: as for linear_cross_entropy.
        teacher_output: the teacher's states [..., d_t] for the same tokens, and its head [V, d_t].

    Returns:
        The scalar loss, and per token [T], detached, in nats and 0 where the weight is 0: the
        cross-entropy and the divergence (without the factor T^2). dtypes as linear_cross_entropy.

    Raises:
        ValueError, InputError: as linear_cross_entropy.
    """
    return _linear_loss(hidden, weight, targets, token_weights, teacher_output, chunk_tokens)


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    teacher_output: TeacherOutput | None,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and per token the cross-entropy and the divergence (empty without a teacher)."""
    assert token_weights.dtype in (torch.float32, torch.float64), (
        f"token weights came as {token_weights.dtype}: under FSDP the root module needs "
        "MixedPrecisionPolicy(cast_forward_inputs=False)"
    )
    teacher: tuple[Any, ...] = (None, None, 0.0, 1.0, 0)
    if teacher_output is not None:
        states, head_weight, *numbers = teacher_output
        teacher = (states.detach().flatten(0, -2), head_weight.detach(), *numbers)
    needs = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss, token_loss, divergences, _, _ = torch.ops.shorn.linear_cross_entropy(
        hidden, weight, targets, token_weights, *teacher, chunk_tokens, *needs
    )
    return loss, token_loss, divergences
