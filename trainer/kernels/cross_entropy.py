"""Softmax cross-entropy of a chunk of logits, in place of which its gradient is left.

A loss that is a weighted sum over tokens has a gradient that is known as soon as its logits are
(Liger, arXiv 2410.10989, section 3.2): the logits are turned into it where they lie. With a
teacher's logits the divergence from it is part of the loss (arXiv 1503.02531, section 2).
`shorn::cross_entropy_` is a PyTorch operator; what it runs on a device is the registry's choice.
"""

import torch
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.arguments import check_like, check_rows, refuse, wide_dtype

NAME = "cross_entropy"
_BLOCK_BYTES = 2**20
"""Of logits per thread that a CPU's cache holds while several operations read and write them."""


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None = None,
    share: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy and divergence; `logits` becomes the gradient of their sum.

    The sum is that of token_weights * ((1 - a) * cross_entropy + a * T^2 * divergence) with
    a = `share` and T = `temperature`; the divergence is KL(teacher || student) of both models'
    logits divided by T.

    Args:
        logits: [t, V], finite, fp64, fp32, bf16 or fp16, contiguous in V. Overwritten.
        targets: [t] int64 class ids in [0, V), which nobody checks.
        token_weights: [t], fp64 when logits are and fp32 otherwise.
        taught: [t, V] the teacher's logits in the same dtype, contiguous in V; None: no
            divergence, the cross-entropy keeps its factor 1 - a.
        share: 0 to 1.
        temperature: above 0.

    Returns:
        The cross-entropies [t] and the divergences [t] (empty [0] without a teacher), in nats and
        token_weights' dtype; 0 where the weight is 0.

    Raises:
        ValueError: a shape, dtype, stride, device or number does not fit.
    """
    if registry.runs_reference(NAME, logits.device):
        return reference(logits, targets, token_weights, taught, share, temperature)
    losses, divergences = torch.ops.shorn.cross_entropy_(
        logits, targets, token_weights, taught, share, temperature
    )
    return losses, divergences


def reference(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` in PyTorch operations."""
    _check(logits, targets, token_weights, taught, share, temperature)
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return _reference(logits, targets, token_weights, taught, share, temperature)
    results = [
        _reference(
            logits[rows],
            targets[rows],
            token_weights[rows],
            None if taught is None else taught[rows],
            share,
            temperature,
        )
        for rows in _blocks(logits)
    ]
    losses, divergences = (torch.cat(parts) for parts in zip(*results, strict=True))
    return losses, divergences


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that a CPU's caches hold, one block after another; one of no rows without tokens."""
    tokens, classes = logits.shape
    row = classes * wide_dtype(logits).itemsize
    block = max(1, torch.get_num_threads() * _BLOCK_BYTES // row)
    return [slice(start, start + block) for start in range(0, tokens or 1, block)]


def _reference(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    ignored, targets = token_weights == 0, targets.unsqueeze(1)
    divergences, difference = token_weights.new_empty(0), None
    if taught is not None:
        divergences, difference = divergence(logits, taught, temperature)
        divergences.masked_fill_(ignored, 0)
        difference.mul_(divergence_scale(token_weights, share, temperature))
    # The logits themselves where they are wide.
    values = logits.to(token_weights.dtype)
    top = values.amax(1, keepdim=True)
    below = top - values.gather(1, targets)
    total = values.sub_(top).exp_().sum(1, keepdim=True)
    losses = (total.log() + below).squeeze(1).masked_fill_(ignored, 0)
    scale = token_weights.unsqueeze(1) * (1 - share)
    values.mul_(scale / total).scatter_add_(1, targets, -scale)
    if difference is not None:
        values.add_(difference)
    if values is not logits:
        logits.copy_(values)
    return losses, divergences


def divergence(logits: Tensor, taught: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) [t] over the columns given, both models' logits divided by the
    temperature, and the difference of their probabilities [t, K], which is its gradient times the
    temperature; in the wide dtype of the logits [t, K]."""
    student, teacher = (_log_probabilities(x, temperature) for x in (logits, taught))
    probabilities = teacher.exp()
    divergences = teacher.sub_(student).mul_(probabilities).sum(1)
    return divergences, student.exp_().sub_(probabilities)


def divergence_scale(token_weights: Tensor, share: float, temperature: float) -> Tensor:
    """Factors [t, 1] of `divergence`'s second result in the gradient by the logits: T^2 of the loss
    times the 1/T of their scaling."""
    return (token_weights * (share * temperature)).unsqueeze(1)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    dtype = wide_dtype(logits)
    scaled = logits if temperature == 1 else logits.to(dtype) / temperature
    return torch.log_softmax(scaled, 1, dtype=dtype)


def _run(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    _check(logits, targets, token_weights, taught, share, temperature)
    module = registry.triton_module(NAME, logits.device)
    if module is not None and module.supports(logits):
        found: tuple[Tensor, Tensor] = module.forward(
            logits, targets, token_weights, taught, share, temperature
        )
        return found
    return reference(logits, targets, token_weights, taught, share, temperature)


def _check(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None,
    share: float,
    temperature: float,
) -> None:
    check_rows(NAME, "logits", logits, 2)
    if logits.shape[1] == 0:
        refuse(NAME, "logits", "at least 1 wide", logits)
    tokens, device = (logits.shape[0],), logits.device
    check_like(NAME, "targets", targets, tokens, (torch.int64,), device)
    check_like(NAME, "token_weights", token_weights, tokens, (wide_dtype(logits),), device)
    check_like(NAME, "taught", taught, tuple(logits.shape), (logits.dtype,), device)
    if taught is not None:
        check_rows(NAME, "taught", taught)
    if not 0 <= share <= 1:
        refuse(NAME, "share", "0 to 1", share)
    if not temperature > 0:
        refuse(NAME, "temperature", "above 0", temperature)


def _fake(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    taught: Tensor | None,
    share: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    _check(logits, targets, token_weights, taught, share, temperature)
    divergences = token_weights.new_empty(0 if taught is None else taught.shape[0])
    return token_weights.new_empty(token_weights.shape), divergences


def _register() -> torch.library.Library:
    space = torch.library.Library("shorn", "FRAGMENT")
    schema = (
        "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor token_weights, Tensor? taught, "
        "float share, float temperature) -> (Tensor, Tensor)"
    )
    registry.define(space, schema, _run, _fake)
    registry.register(registry.Operator(NAME, reference, "trainer.kernels.cross_entropy_triton"))
    return space


_SPACE = _register()
