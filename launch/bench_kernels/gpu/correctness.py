"""One case of one operator against its formula in fp64, with gradients; part of gpu_worker."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from launch.bench_kernels.gpu.cases import DTYPES, ROWS, Case, Tensors, arguments
from trainer.kernels import registry

ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10.9}
# The reference rounds between its operations, in both passes.
ROUNDINGS = {"reference": 5, "pytorch": 5}
SMALLEST_ERROR = 1e-7
POISONED_VALUES = (8, 512, 4096, 65536, 2**20, 2**23)
POISONED_VALUES_OF_CPU = 4096


class WrongResultError(Exception):
    """A result that is not what it must be; the message says which, and by how much."""


def check(unit: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Runs a case forward and backward.

    Args:
        unit: operator, choice (of the registry), backend (what must run) and case, plain values.

    Returns:
        {"worst": largest error over the allowed one}.

    Raises:
        WrongResultError: a result or gradient is wrong, or another implementation ran.
    """
    name, case = unit["operator"], Case(**unit["case"])
    inputs, constants = arguments(name, case, device)
    with poisoned(device), registry.chosen(unit["choice"], device) as running:
        if name in running and running[name] != unit["backend"]:
            raise WrongResultError(f"{running[name]} ran instead of {unit['backend']}")
        return {"worst": _compare(name, case, unit["backend"], inputs, constants)}


def _compare(name: str, case: Case, backend: str, inputs: Tensors, constants: Tensors) -> float:
    row = ROWS[name]
    leaves, exact = _leaves(inputs), _leaves([None if x is None else x.double() for x in inputs])
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in constants]
    found = row.run(case, *leaves, *constants)
    expected = row.formula(case, *exact, *wide)
    limits = (row.tolerance[case.dtype], ROUNDINGS.get(backend, 1), ROUNDING[DTYPES[case.dtype]])
    worst = 0.0
    for index, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        worst = max(worst, require_close(f"result {index}", result, wanted, *limits))
    differentiable = [index for index, result in enumerate(expected) if result.requires_grad]
    gradients = [_with_gaps(torch.randn_like(found[index])) for index in differentiable]
    received = torch.autograd.grad(
        [found[index] for index in differentiable], _present(leaves), gradients
    )
    correct = torch.autograd.grad(
        [expected[index] for index in differentiable],
        _present(exact),
        [gradient.double() for gradient in gradients],
    )
    for index, (gradient, wanted) in enumerate(zip(received, correct, strict=True)):
        what = f"gradient {index}"
        worst = max(worst, require_close(what, gradient, wanted, *limits))
    return worst


def require_close(
    what: str,
    found: Tensor,
    expected: Tensor,
    tolerance: float,
    roundings: int = 1,
    unit: float = 0.0,
) -> float:
    """The largest error over the allowed one: one rounding of each value to its own dtype, or
    several of relative size `unit` of the largest value; and `tolerance` times the largest value.
    Raises WrongResultError where that is more than 1."""
    if found.shape != expected.shape:
        raise WrongResultError(f"{what} has shape {list(found.shape)}, not {list(expected.shape)}")
    if not found.numel():
        return 0.0
    found, expected = found.detach(), expected.detach()
    error = (found.double() - expected).abs()
    largest = expected.abs().max()
    # Of a sum whose terms were rounded, the terms may be larger than the sum.
    rounded = (
        ROUNDING[found.dtype] * expected.abs() if roundings == 1 else roundings * unit * largest
    )
    ratio = error / (rounded + tolerance * largest + SMALLEST_ERROR)
    worst = float(ratio.max())
    if not worst <= 1:
        wrong = int((~(ratio <= 1)).sum())
        raise WrongResultError(
            f"{what}: {wrong} of {ratio.numel()} values are wrong, by up to "
            f"{float(error.max()):.3g} where the largest is {float(largest):.3g}"
        )
    return worst


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Within it, memory that PyTorch hands out holds NaN, and so does what the allocator keeps."""
    before = torch.are_deterministic_algorithms_enabled()
    # Compiled operators may allocate past this switch: what they get was NaN before.
    sizes = [n for n in POISONED_VALUES if device.type == "cuda" or n <= POISONED_VALUES_OF_CPU]
    kept = [torch.full((n,), torch.nan, device=device) for n in sizes for _ in range(4)]
    del kept
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if not bool(torch.empty(64, device=device).isnan().all()):
            raise WrongResultError("memory could not be filled with NaN before the call")
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _leaves(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same values and strides, as leaves that want gradients."""
    return [None if x is None else x.detach().requires_grad_() for x in inputs]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _with_gaps(values: Tensor) -> Tensor:
    """The values as part of a wider tensor that holds NaN beside them."""
    if values.dim() == 0:
        return values
    wider = values.new_full((*values.shape[:-1], values.shape[-1] + 5), torch.nan)
    wider[..., : values.shape[-1]] = values
    return wider[..., : values.shape[-1]]
