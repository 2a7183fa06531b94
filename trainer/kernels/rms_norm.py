"""RMSNorm, fused with the addition to the residual stream before it.

h = x + r and y = h / sqrt(mean(h^2) * c + eps) * w (arXiv 1910.07467), with gain w and a factor c
that makes the mean square one over the computed dimensions, where the others hold 0.
`shorn::rms_norm` and `shorn::rms_norm_backward` are PyTorch operators that run Triton kernels;
`rms_norm` calls them where the registry chose kernels.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.arguments import FLOATING, check_like, check_rows, refuse, wide_dtype

NAME = "rms_norm"


def rms_norm(
    x: Tensor,
    gain: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual over the last dimension, and that sum.

    Args:
        x: [..., d], fp64, fp32, bf16 or fp16, contiguous in d.
        gain: [d], one of these dtypes.
        eps: added to the mean square.
        residual: [..., d] in x's dtype; None: zeros.
        scale: scalar, fp64 when x is and fp32 otherwise; multiplies the mean square and gets no
            gradient. None: 1.

    Returns:
        The norm [..., d] of the rounded sum, and the sum [..., d], x itself without a residual;
        both in x's dtype. Kernels compute in fp32 and round once; the reference also rounds before
        the gain, as Hugging Face's models do.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if not registry.runs_kernels(NAME, x):
        return reference(x, gain, residual, scale, eps)
    normed, total, _ = torch.ops.shorn.rms_norm(x, gain, residual, scale, eps)
    return normed, x if residual is None else total


def reference(
    x: Tensor, gain: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in PyTorch operations."""
    _check(x, gain, residual, scale, eps)
    total = x if residual is None else x + residual
    values = total.to(wide_dtype(total))
    mean_square = values.square().mean(-1, keepdim=True)
    inverse = torch.rsqrt((mean_square if scale is None else mean_square * scale) + eps)
    normed = (values * inverse).to(total.dtype)
    return (gain * normed).to(total.dtype), total


def _check(
    x: Tensor, gain: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
) -> None:
    check_rows(NAME, "x", x)
    if x.shape[-1] == 0:
        refuse(NAME, "x", "at least 1 wide", x)
    check_like(NAME, "gain", gain, (x.shape[-1],), FLOATING, x.device)
    check_like(NAME, "residual", residual, tuple(x.shape), (x.dtype,), x.device)
    check_like(NAME, "scale", scale, (), (wide_dtype(x),), x.device)
    if residual is not None:
        check_rows(NAME, "residual", residual)
    if not eps >= 0:
        refuse(NAME, "eps", "at least 0", eps)


def _check_backward(
    gradient: Tensor, total_gradient: Tensor | None, total: Tensor, *_: Tensor | None
) -> None:
    for name, tensor in (("gradient", gradient), ("total_gradient", total_gradient)):
        check_like(NAME, name, tensor, tuple(total.shape), (total.dtype,), total.device)


def _fake(
    x: Tensor, gain: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, gain, residual, scale, eps)
    # No result may be an argument: there is no sum without a residual.
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_backward(
    gradient: Tensor,
    total_gradient: Tensor | None,
    total: Tensor,
    rstd: Tensor,
    gain: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), gain.new_empty(gain.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gain, residual, scale, _ = inputs
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, rstd, gain, scale)


def _differentiate(
    ctx: Any, gradient: Tensor | None, total_gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if not ctx.has_residual:
        total_gradient = None
    if gradient is None:
        return total_gradient, None, total_gradient, None, None
    d_total, d_gain = torch.ops.shorn.rms_norm_backward(
        gradient, total_gradient, *ctx.saved_tensors
    )
    return d_total, d_gain, d_total if ctx.has_residual else None, None, None


registry.define(
    "rms_norm(Tensor x, Tensor gain, Tensor? residual, Tensor? scale, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    registry.kernel(NAME, "forward", _check),
    _fake,
    _save,
    _differentiate,
)
registry.define(
    "rms_norm_backward(Tensor gradient, Tensor? total_gradient, Tensor total, Tensor rstd, "
    "Tensor gain, Tensor? scale) -> (Tensor, Tensor)",
    registry.kernel(NAME, "backward", _check_backward),
    _fake_backward,
)
registry.register(registry.Operator(NAME, widest=65536))
