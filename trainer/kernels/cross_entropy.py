"""Softmax cross-entropy of a chunk of logits, in place of which its gradient is left.

A loss that is a weighted sum over tokens has a gradient that is known as soon as its logits are
(Liger, arXiv 2410.10989, section 3.2): the logits are turned into it where they lie. With a
teacher's logits the divergence from it is part of the loss (arXiv 1503.02531, section 2).
`shorn::cross_entropy_` is a PyTorch operator that runs a Triton kernel; `cross_entropy_` calls it
where the registry chose kernels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.arguments import check_like, check_rows, refuse, wide_dtype

NAME = "cross_entropy"
_BLOCK_BYTES = 2**20
"""Of logits per thread that a CPU's cache holds while several operations read and write them."""


class Inputs(NamedTuple):
    """Arguments of `cross_entropy_`, as its operator takes them too."""

    logits: Tensor
    targets: Tensor
    token_weights: Tensor
    teacher_logits: Tensor | None
    alpha: float
    temperature: float


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy and divergence; `logits` becomes the gradient of their sum.

    The sum is that of token_weights * ((1 - a) * cross_entropy + a * T^2 * divergence) with
    a = `alpha` and T = `temperature`; the divergence is KL(teacher || student) of both models'
    logits divided by T.

    Args:
        logits: [t, V], finite, fp64, fp32, bf16 or fp16, contiguous in V. Overwritten.
        targets: [t] int64 class ids in [0, V), which nobody checks.
        token_weights: [t], fp64 when logits are and fp32 otherwise.
        teacher_logits: [t, V] the teacher's logits in the same dtype, contiguous in V; None: no
            divergence, the cross-entropy keeps its factor 1 - a.
        alpha: 0 to 1.
        temperature: above 0.

    Returns:
        The cross-entropies [t] and the divergences [t] (empty [0] without a teacher), in nats and
        token_weights' dtype; 0 where the weight is 0.

    Raises:
        ValueError: a shape, dtype, stride, device or number does not fit.
    """
    inputs = Inputs(logits, targets, token_weights, teacher_logits, alpha, temperature)
    if not registry.runs_kernels(NAME, logits):
        return reference(inputs)
    losses, divergences = torch.ops.shorn.cross_entropy_(*inputs)
    return losses, divergences


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` in PyTorch operations."""
    _check(inputs)
    if inputs.logits.device.type != "cpu" or torch.compiler.is_compiling():
        return _reference(inputs)
    tensors: dict[str, Any] = {
        name: x for name, x in inputs._asdict().items() if isinstance(x, Tensor)
    }
    results = [
        _reference(inputs._replace(**{name: x[rows] for name, x in tensors.items()}))
        for rows in _blocks(inputs.logits)
    ]
    losses, divergences = (torch.cat(parts) for parts in zip(*results, strict=True))
    return losses, divergences


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that a CPU's caches hold, one block after another; one of no rows without tokens."""
    tokens, classes = logits.shape
    row = classes * wide_dtype(logits).itemsize
    block = max(1, torch.get_num_threads() * _BLOCK_BYTES // row)
    return [slice(start, start + block) for start in range(0, tokens or 1, block)]


def _reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    logits, targets, token_weights, teacher_logits, alpha, temperature = inputs
    ignored, targets = token_weights == 0, targets.unsqueeze(1)
    divergences, difference = token_weights.new_empty(0), None
    if teacher_logits is not None:
        divergences, difference = divergence(logits, teacher_logits, temperature)
        divergences.masked_fill_(ignored, 0)
        difference.mul_(divergence_scale(token_weights, alpha, temperature))
    # The logits themselves where they are wide.
    values = logits.to(token_weights.dtype)
    top = values.amax(1, keepdim=True)
    below = top - values.gather(1, targets)
    total = values.sub_(top).exp_().sum(1, keepdim=True)
    losses = (total.log() + below).squeeze(1).masked_fill_(ignored, 0)
    scale = token_weights.unsqueeze(1) * (1 - alpha)
    values.mul_(scale / total).scatter_add_(1, targets, -scale)
    if difference is not None:
        values.add_(difference)
    if values is not logits:
        logits.copy_(values)
    return losses, divergences


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) [t] over the columns given, both models' logits divided by the
    temperature, and the difference of their probabilities [t, K], which is its gradient times the
    temperature; in the wide dtype of the logits [t, K]."""
    student, teacher = (_log_probabilities(x, temperature) for x in (logits, teacher_logits))
    probabilities = teacher.exp()
    divergences = teacher.sub_(student).mul_(probabilities).sum(1)
    return divergences, student.exp_().sub_(probabilities)


def divergence_scale(token_weights: Tensor, alpha: float, temperature: float) -> Tensor:
    """Factors [t, 1] of `divergence`'s second result in the gradient by the logits: T^2 of the loss
    times the 1/T of their scaling."""
    return (token_weights * (alpha * temperature)).unsqueeze(1)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    dtype = wide_dtype(logits)
    scaled = logits if temperature == 1 else logits.to(dtype) / temperature
    return torch.log_softmax(scaled, 1, dtype=dtype)


def _check(inputs: Inputs) -> None:
    logits, targets, token_weights, teacher_logits, alpha, temperature = inputs
    check_rows(NAME, "logits", logits, 2)
    if logits.shape[1] == 0:
        refuse(NAME, "logits", "at least 1 wide", logits)
    tokens, device = (logits.shape[0],), logits.device
    check_like(NAME, "targets", targets, tokens, (torch.int64,), device)
    check_like(NAME, "token_weights", token_weights, tokens, (wide_dtype(logits),), device)
    shape = tuple(logits.shape)
    check_like(NAME, "teacher_logits", teacher_logits, shape, (logits.dtype,), device)
    if teacher_logits is not None:
        check_rows(NAME, "teacher_logits", teacher_logits)
    if not 0 <= alpha <= 1:
        refuse(NAME, "alpha", "0 to 1", alpha)
    if not temperature > 0:
        refuse(NAME, "temperature", "above 0", temperature)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs = Inputs(*arguments)
    _check(inputs)
    tokens = inputs.token_weights.shape[0]
    divergences = inputs.token_weights.new_empty(0 if inputs.teacher_logits is None else tokens)
    return inputs.token_weights.new_empty(tokens), divergences


registry.define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor token_weights, "
    "Tensor? teacher_logits, float alpha, float temperature) -> (Tensor, Tensor)",
    registry.kernel(NAME, "forward", lambda *arguments: _check(Inputs(*arguments))),
    _fake,
)
registry.register(registry.Operator(NAME))
