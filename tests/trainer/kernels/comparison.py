"""Operators against the same formula in fp64, with gradients."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10.9}
# Of a GPU, whose exponentials and quotients are approximations.
LEAST_TOLERANCE = 2e-5

Formula = Callable[..., Tensor | tuple[Tensor, ...]]


def draw_mask(size: int, generator: random.Random) -> Tensor | None:
    """None, or fp32 values of which a third each are 0, 1 and between."""
    if generator.random() < 0.25:
        return None
    return (torch.rand(size) * 3 - 1).clamp(0, 1)


def draw_rows(shape: Sequence[int], dtype: torch.dtype, generator: random.Random) -> Tensor:
    """Normal values [..., d], contiguous, part of a wider tensor, or with dimensions exchanged."""
    kind = generator.random()
    if kind < 0.2:
        return torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 1 : shape[-1] + 1]
    if kind < 0.4 and len(shape) > 2:
        exchanged = torch.randn(shape[1], shape[0], *shape[2:]).to(dtype)
        return exchanged.transpose(0, 1)
    return torch.randn(*shape).to(dtype)


def differentiable(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same values as a leaf with the same strides, or without them in another dtype."""
    if dtype is not None:
        return tensor.to(dtype).requires_grad_()
    leaf = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return leaf.copy_(tensor).requires_grad_()


def compare(
    operator: Formula,
    formula: Formula,
    inputs: Sequence[Tensor | None],
    *,
    tolerance: float = 3e-6,
    roundings: int = 1,
) -> None:
    """`operator` gives what `formula` gives in fp64, and its gradients, up to `roundings`: one of
    each result's own dtype, or several of the coarsest dtype of the inputs.

    Both take `inputs`, of which None are absent. The gradients of their results are random, the
    same for both, and have gaps between their rows.
    """
    leaves = [None if tensor is None else differentiable(tensor) for tensor in inputs]
    exact = [None if tensor is None else differentiable(tensor, torch.float64) for tensor in inputs]
    coarsest = max(ROUNDING[tensor.dtype] for tensor in inputs if tensor is not None)
    unit = coarsest if roundings > 1 else None
    found, expected = _tuple(operator(*leaves)), _tuple(formula(*exact))
    for result, wanted in zip(found, expected, strict=True):
        close(result, wanted, tolerance, roundings, unit)
    gradients = [_with_gaps(torch.randn(result.shape).to(result.dtype)) for result in found]
    present = [index for index, tensor in enumerate(inputs) if tensor is not None]
    received = torch.autograd.grad(found, [x for x in leaves if x is not None], gradients)
    wide = [gradient.double() for gradient in gradients]
    correct = torch.autograd.grad(expected, [x for x in exact if x is not None], wide)
    for index, gradient, wanted in zip(present, received, correct, strict=True):
        source = inputs[index]
        assert source is not None
        assert gradient.dtype == source.dtype
        close(gradient, wanted, tolerance, roundings, unit)


def close(
    found: Tensor,
    expected: Tensor,
    tolerance: float,
    roundings: int = 1,
    unit: float | None = None,
) -> None:
    """Equal up to this many roundings of a value, of relative size `unit` (None: of its dtype), and
    `tolerance` times the largest."""
    assert found.shape == expected.shape
    if not found.numel():
        return
    error = (found.double() - expected).abs()
    largest = expected.abs().max()
    if found.is_cuda and found.dtype != torch.float64:
        tolerance = max(tolerance, LEAST_TOLERANCE)
    # Of a sum whose terms were rounded, the terms may be larger than the sum.
    unit = ROUNDING[found.dtype] if unit is None else unit
    rounded = unit * (expected.abs() if roundings == 1 else roundings * largest)
    allowed = rounded + tolerance * largest + 1e-7
    assert bool((error <= allowed).all()), f"{error.max()} of {expected.abs().max()}"


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def _with_gaps(values: Tensor) -> Tensor:
    if values.dim() == 0:
        return values
    wider = torch.full((*values.shape[:-1], values.shape[-1] + 5), torch.nan, dtype=values.dtype)
    wider[..., : values.shape[-1]] = values
    return wider[..., : values.shape[-1]]


def compiles(operator: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """torch.compile traces it as one graph, with the same result and gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    expected = operator(*leaves)
    wanted = torch.autograd.grad(expected, leaves)
    torch._dynamo.reset()
    found = torch.compile(operator, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, other)
