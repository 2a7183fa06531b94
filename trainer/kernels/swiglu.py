"""SwiGLU: silu(gate) * up (arXiv 2002.05202, equation 6).

`shorn::swiglu` and `shorn::swiglu_backward` are PyTorch operators that run Triton kernels; `swiglu`
calls them where the registry chose kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels import registry
from trainer.kernels.arguments import check_like, check_rows

NAME = "swiglu"


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate: [..., F], fp64, fp32, bf16 or fp16, contiguous in F; may be part of a wider tensor.
        up: [..., F] in gate's dtype, contiguous in F.

    Returns:
        [..., F] in gate's dtype. Kernels compute in fp32 and round once; the reference rounds after
        every operation, as plain PyTorch does.

    Raises:
        ValueError: a shape, dtype, stride or device does not fit.
    """
    if not registry.runs_kernels(NAME, gate):
        return reference(gate, up)
    result: Tensor = torch.ops.shorn.swiglu(gate, up)
    return result


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in PyTorch operations."""
    _check(gate, up)
    return F.silu(gate) * up


def _check(gate: Tensor, up: Tensor) -> None:
    check_rows(NAME, "gate", gate)
    check_like(NAME, "up", up, tuple(gate.shape), (gate.dtype,), gate.device)
    check_rows(NAME, "up", up)


def _check_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> None:
    check_like(NAME, "gradient", gradient, tuple(gate.shape), (gate.dtype,), gate.device)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return gate.new_empty(gate.shape)


def _fake_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.ops.shorn.swiglu_backward(gradient, *ctx.saved_tensors)
    return d_gate, d_up


registry.define(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    registry.kernel(NAME, "forward", _check),
    _fake,
    _save,
    _differentiate,
)
registry.define(
    "swiglu_backward(Tensor gradient, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    registry.kernel(NAME, "backward", _check_backward),
    _fake_backward,
)
registry.register(registry.Operator(NAME))
