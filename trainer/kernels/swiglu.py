"""Masked SwiGLU: silu(gate) * up * mask, and the gradient of the mask without stored products.

SwiGLU is arXiv 2002.05202, equation 6; the mask scales channels. `shorn::swiglu` and
`shorn::swiglu_backward` are PyTorch operators; what they run on a device is the registry's choice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.arguments import check_like, check_rows, wide_dtype

NAME = "swiglu"


def swiglu(gate: Tensor, up: Tensor, mask: Tensor | None = None) -> Tensor:
    """silu(gate) * up * mask.

    Args:
        gate: [..., F], fp64, fp32, bf16 or fp16, contiguous in F; may be part of a wider tensor.
        up: [..., F] in gate's dtype, contiguous in F.
        mask: [F], fp64 when gate is and fp32 otherwise; None: ones.

    Returns:
        [..., F] in gate's dtype. Kernels compute in fp32 and round once; the reference rounds after
        every operation, as plain PyTorch does.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if registry.runs_reference(NAME, gate.device):
        return reference(gate, up, mask)
    result: Tensor = torch.ops.shorn.swiglu(gate, up, mask)
    return result


def reference(gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    """`swiglu` in PyTorch operations."""
    _check(gate, up, mask)
    product = F.silu(gate) * up
    return product if mask is None else (product * mask).to(gate.dtype)


def _forward(gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    _check(gate, up, mask)
    module = registry.triton_module(NAME, gate.device)
    if module is not None and module.supports(gate):
        found: Tensor = module.forward(gate, up, mask)
        return found
    dtype = wide_dtype(gate)
    product = F.silu(gate.to(dtype)) * up.to(dtype)
    return (product if mask is None else product * mask).to(gate.dtype).contiguous()


def _backward(
    gradient: Tensor, gate: Tensor, up: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, up and mask (empty [0] without one)."""
    check_like(NAME, "gradient", gradient, tuple(gate.shape), (gate.dtype,), gate.device)
    module = registry.triton_module(NAME, gate.device)
    if module is not None and module.supports(gate):
        found: tuple[Tensor, Tensor, Tensor] = module.backward(gradient, gate, up, mask)
        return found
    dtype = wide_dtype(gate)
    values, inner = gate.to(dtype), gradient.to(dtype)
    sigmoid = torch.sigmoid(values)
    activated = values * sigmoid
    sums = inner.new_empty(0)
    if mask is not None:
        sums = (inner * activated * up).reshape(-1, gate.shape[-1]).sum(0)
        inner = inner * mask
    d_gate = inner * up * sigmoid * (1 + values - activated)
    d_up = inner * activated
    return d_gate.to(gate.dtype).contiguous(), d_up.to(gate.dtype).contiguous(), sums


def _check(gate: Tensor, up: Tensor, mask: Tensor | None) -> None:
    check_rows(NAME, "gate", gate)
    check_like(NAME, "up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    check_rows(NAME, "up", up)
    check_like(NAME, "mask", mask, (gate.shape[-1],), (wide_dtype(gate),), gate.device)


def _fake_forward(gate: Tensor, up: Tensor, mask: Tensor | None) -> Tensor:
    _check(gate, up, mask)
    return gate.new_empty(gate.shape)


def _fake_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_mask = gate.new_empty(0 if mask is None else mask.shape[0], dtype=wide_dtype(gate))
    return gate.new_empty(gate.shape), up.new_empty(up.shape), d_mask


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.has_mask = inputs[2] is not None
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    d_gate, d_up, d_mask = torch.ops.shorn.swiglu_backward(gradient, *ctx.saved_tensors)
    return d_gate, d_up, d_mask if ctx.has_mask else None


def _register() -> torch.library.Library:
    space = torch.library.Library("shorn", "FRAGMENT")
    forward = "swiglu(Tensor gate, Tensor up, Tensor? mask) -> Tensor"
    backward = (
        "swiglu_backward(Tensor gradient, Tensor gate, Tensor up, Tensor? mask) "
        "-> (Tensor, Tensor, Tensor)"
    )
    registry.define(space, forward, _forward, _fake_forward)
    registry.define(space, backward, _backward, _fake_backward)
    torch.library.register_autograd("shorn::swiglu", _differentiate, setup_context=_save, lib=space)
    registry.register(registry.Operator(NAME, reference, "trainer.kernels.swiglu_triton"))
    return space


_SPACE = _register()
