"""RMSNorm with a mask in its gain, fused with the addition to the residual stream before it.

h = x + r and y = h / sqrt(mean(h^2) * c + eps) * w * z (arXiv 1910.07467), with gain w, mask z, and
a factor c that makes the mean square one over the live dimensions, where the others hold 0.
`shorn::rms_norm` and `shorn::rms_norm_backward` are PyTorch operators; what they run on a device is
the registry's choice.
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
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual over the last dimension, and that sum.

    Args:
        x: [..., d], fp64, fp32, bf16 or fp16, contiguous in d.
        gain: [d], one of these dtypes.
        eps: added to the mean square.
        mask: [d], fp64 when x is and fp32 otherwise; multiplies the gain. None: ones.
        residual: [..., d] in x's dtype; None: zeros.
        scale: scalar, dtype as `mask`; multiplies the mean square and gets no gradient. None: 1.

    Returns:
        The norm [..., d] of the rounded sum, and the sum [..., d], x itself without a residual;
        both in x's dtype. Kernels compute in fp32 and round once; the reference also rounds before
        the gain, as Hugging Face's models do.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if registry.runs_reference(NAME, x.device):
        return reference(x, gain, mask, residual, scale, eps)
    normed, total, _ = torch.ops.shorn.rms_norm(x, gain, mask, residual, scale, eps)
    return normed, x if residual is None else total


def reference(
    x: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` in PyTorch operations."""
    _check(x, gain, mask, residual, scale, eps)
    total = x if residual is None else x + residual
    values = total.to(wide_dtype(total))
    normed = (values * _inverse(values, scale, eps)).to(total.dtype)
    factor = gain if mask is None else (gain * mask).to(gain.dtype)
    return (factor * normed).to(total.dtype), total


def _inverse(values: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """Inverse root mean squares [..., 1]."""
    mean_square = values.square().mean(-1, keepdim=True)
    return torch.rsqrt((mean_square if scale is None else mean_square * scale) + eps)


def _normalise(
    total: Tensor, gain: Tensor, mask: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm [..., d], and the inverse root mean squares [...] in the wide dtype."""
    values = total.to(wide_dtype(total))
    inverse = _inverse(values, scale, eps)
    normed = values * inverse * _factor(gain, mask, values.dtype)
    return normed.to(total.dtype), inverse.squeeze(-1)


def _factor(gain: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    return gain.to(dtype) if mask is None else gain.to(dtype) * mask


def _forward(
    x: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, sum (empty [0] without a residual: no result may be an argument), inverse roots."""
    _check(x, gain, mask, residual, scale, eps)
    module = registry.triton_module(NAME, x.device)
    if module is not None and module.supports(x):
        found: tuple[Tensor, Tensor, Tensor] = module.forward(x, gain, mask, residual, scale, eps)
        return found
    total = x if residual is None else x + residual
    normed, inverse = _normalise(total, gain, mask, scale, eps)
    sums = x.new_empty(0) if residual is None else total.contiguous()
    return normed.contiguous(), sums, inverse.contiguous()


def _backward(
    gradient: Tensor,
    total_gradient: Tensor | None,
    total: Tensor,
    inverse: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (and the residual), gain and mask (empty [0] without one)."""
    dtype = wide_dtype(total)
    for name, tensor in (("gradient", gradient), ("total_gradient", total_gradient)):
        check_like(NAME, name, tensor, tuple(total.shape), (total.dtype,), total.device)
    module = registry.triton_module(NAME, total.device)
    if module is not None and module.supports(total):
        found: tuple[Tensor, Tensor, Tensor] = module.backward(
            gradient, total_gradient, total, inverse, gain, mask, scale
        )
        return found
    normalised = total.to(dtype) * inverse.unsqueeze(-1)
    inner = gradient.to(dtype) * _factor(gain, mask, dtype)
    along = (inner * normalised).mean(-1, keepdim=True)
    if scale is not None:
        along = along * scale
    d_total = (inner - normalised * along) * inverse.unsqueeze(-1)
    if total_gradient is not None:
        d_total = d_total + total_gradient
    sums = (gradient.to(dtype) * normalised).reshape(-1, total.shape[-1]).sum(0)
    return d_total.to(total.dtype).contiguous(), *split_gain(sums, gain, mask)


def split_gain(sums: Tensor, gain: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gain and mask from that of their product [d]; empty [0] for an absent mask."""
    if mask is None:
        return sums.to(gain.dtype), sums.new_empty(0)
    return (sums * mask).to(gain.dtype), sums * gain.to(sums.dtype)


def _check(
    x: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> None:
    check_rows(NAME, "x", x)
    if x.shape[-1] == 0:
        refuse(NAME, "x", "at least 1 wide", x)
    width, wide = (x.shape[-1],), (wide_dtype(x),)
    check_like(NAME, "gain", gain, width, FLOATING, x.device)
    check_like(NAME, "mask", mask, width, wide, x.device)
    check_like(NAME, "residual", residual, tuple(x.shape), (x.dtype,), x.device)
    check_like(NAME, "scale", scale, (), wide, x.device)
    if residual is not None:
        check_rows(NAME, "residual", residual)
    if not eps >= 0:
        refuse(NAME, "eps", "at least 0", eps)


def _fake_forward(
    x: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, gain, mask, residual, scale, eps)
    sums = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), sums, x.new_empty(x.shape[:-1], dtype=wide_dtype(x))


def _fake_backward(
    gradient: Tensor,
    total_gradient: Tensor | None,
    total: Tensor,
    inverse: Tensor,
    gain: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    d_mask = total.new_empty(0 if mask is None else mask.shape[0], dtype=wide_dtype(total))
    return total.new_empty(total.shape), gain.new_empty(gain.shape), d_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gain, mask, residual, scale, _ = inputs
    _, total, inverse = output
    ctx.set_materialize_grads(False)
    ctx.has_mask, ctx.has_residual = mask is not None, residual is not None
    ctx.save_for_backward(x if residual is None else total, inverse, gain, mask, scale)


def _differentiate(
    ctx: Any, gradient: Tensor | None, total_gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if not ctx.has_residual:
        total_gradient = None
    if gradient is None:
        return total_gradient, None, None, total_gradient, None, None
    total, inverse, gain, mask, scale = ctx.saved_tensors
    d_total, d_gain, d_mask = torch.ops.shorn.rms_norm_backward(
        gradient, total_gradient, total, inverse, gain, mask, scale
    )
    d_residual = d_total if ctx.has_residual else None
    return d_total, d_gain, d_mask if ctx.has_mask else None, d_residual, None, None


def _register() -> torch.library.Library:
    space = torch.library.Library("shorn", "FRAGMENT")
    forward = (
        "rms_norm(Tensor x, Tensor gain, Tensor? mask, Tensor? residual, Tensor? scale, "
        "float eps) -> (Tensor, Tensor, Tensor)"
    )
    backward = (
        "rms_norm_backward(Tensor gradient, Tensor? total_gradient, Tensor total, Tensor inverse, "
        "Tensor gain, Tensor? mask, Tensor? scale) -> (Tensor, Tensor, Tensor)"
    )
    registry.define(space, forward, _forward, _fake_forward)
    registry.define(space, backward, _backward, _fake_backward)
    torch.library.register_autograd(
        "shorn::rms_norm", _differentiate, setup_context=_save, lib=space
    )
    registry.register(registry.Operator(NAME, reference, "trainer.kernels.rms_norm_triton"))
    return space


_SPACE = _register()
