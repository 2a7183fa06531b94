"""Gather-scale: the computed part of a weight with its masks folded in, and all gradients of it.

W'[i, j] = W[r_i, c_j] * z_r[r_i] * z_c[c_j]. With y = W' x the gradients of the masks are the
weighted row and column sums of W * dW', exact also where a mask is zero, so that no activation has
to be kept for them. Units left out have mask 0 and receive a zero gradient.

`shorn::gather_scale` and `shorn::gather_scale_backward` are PyTorch operators; what they run on a
device is the registry's choice. csrc/gather_scale.{cpp,cu} implement two more, which share their
schemas and end in "_compiled". What torch.compile does not trace goes past the first two: every
pass comes here once for each weight, and for small ones their way through Python costs as much.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels import library, registry
from trainer.kernels.arguments import FLOATING, check_like, refuse, wide_dtype

NAME = "gather_scale"

Needs = tuple[bool, bool, bool]
Gradients = tuple[Tensor, Tensor, Tensor]

_COMPILED = ("c++", "cuda")


class Selection(NamedTuple):
    """Arguments of `gather_scale`, as its operators take them too."""

    weight: Tensor
    rows: Tensor | None = None
    row_scale: Tensor | None = None
    columns: Tensor | None = None
    column_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result."""
        n, m = self.weight.shape
        return (
            n if self.rows is None else self.rows.shape[0],
            m if self.columns is None else self.columns.shape[0],
        )


def gather_scale(
    weight: Tensor,
    rows: Tensor | None = None,
    row_scale: Tensor | None = None,
    columns: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """Selected rows and columns of a weight, scaled, in contiguous memory.

    Args:
        weight: [out, in], fp64, fp32, bf16 or fp16.
        rows: [n] int64, unique, below out; None: all.
        row_scale: [out], fp64 when the weight is and fp32 otherwise; None: ones.
        columns: [m] int64, unique, below in; None: all.
        column_scale: [in], dtype as `row_scale`; None: ones.

    Returns:
        [n, m] in the weight's dtype, multiplied in the dtype of the scales and rounded once.

    Raises:
        ValueError: a shape, dtype or device does not fit, or (on a CPU) an index is out of range.
    """
    selection = Selection(weight, rows, row_scale, columns, column_scale)
    if registry.runs_reference(NAME, weight.device):
        return _forward(selection)
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.shorn.gather_scale(*selection)
        return traced
    if torch.is_grad_enabled():
        recorded: Tensor = _GatherScale.apply(*selection)
        return recorded
    return _run_forward(*selection)


def gather_scale_backward(
    gradient: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `gather_scale` for its weight, row scale and column scale.

    Args:
        gradient: [n, m] of the result, in the weight's dtype or fp32.
        needs: which of the three are wanted; the others are None, as is that of an absent scale.

    Returns:
        d_weight [out, in] in the weight's dtype, and the gradients [out] and [in] of the scales in
        theirs; 0 outside the selection.

    Raises:
        ValueError: as `gather_scale`.
    """
    run: Callable[..., Gradients] = _run_backward
    if registry.runs_reference(NAME, weight.device):
        run = _backward
    elif torch.compiler.is_compiling():
        run = torch.ops.shorn.gather_scale_backward
    return _gradients(run, gradient, (weight, rows, row_scale, columns, column_scale), needs)


def _gradients(
    run: Callable[..., Gradients], gradient: Tensor, selection: tuple[Any, ...], needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `run` finds, without what is not needed."""
    _, _, row_scale, _, column_scale = selection
    wanted = (
        needs[0],
        needs[1] and row_scale is not None,
        needs[2] and column_scale is not None,
    )
    found = run(gradient, *selection, *wanted)
    d_weight, d_row_scale, d_column_scale = (
        tensor if want else None for tensor, want in zip(found, wanted, strict=True)
    )
    return d_weight, d_row_scale, d_column_scale


def _forward(selection: Selection) -> Tensor:
    """The reference."""
    _check_all(selection)
    weight, rows, row_scale, columns, column_scale = selection
    selected = _select(weight, rows, columns)
    if row_scale is not None:
        selected = selected * _select(row_scale, rows).unsqueeze(1)
    if column_scale is not None:
        selected = selected * _select(column_scale, columns)
    if selected is weight:
        return weight.clone(memory_format=torch.contiguous_format)
    return selected.to(weight.dtype).contiguous()


def _backward(gradient: Tensor, *arguments: Any) -> Gradients:
    """The reference. Gradients that are not needed are empty tensors [0]."""
    need_weight, need_row_scale, need_column_scale = arguments[5:]
    selection = Selection(*arguments[:5])
    _check_all(selection, gradient)
    weight, rows, row_scale, columns, column_scale = selection
    dtype = wide_dtype(weight)
    gradient = gradient.to(dtype)
    by_row = None if row_scale is None else _select(row_scale, rows)
    by_column = None if column_scale is None else _select(column_scale, columns)
    d_weight = weight.new_empty(0)
    # No result of an operator may be another one.
    d_row_scale, d_column_scale = (weight.new_empty(0, dtype=dtype) for _ in range(2))
    if need_row_scale or need_column_scale:
        product = gradient * _select(weight, rows, columns)
        if need_row_scale:
            sums = product.sum(1) if by_column is None else product @ by_column
            d_row_scale = _spread(sums, rows, weight.shape[0])
        if need_column_scale:
            sums = product.sum(0) if by_row is None else by_row @ product
            d_column_scale = _spread(sums, columns, weight.shape[1])
    if need_weight:
        inner = gradient if by_row is None else gradient * by_row.unsqueeze(1)
        inner = inner if by_column is None else inner * by_column
        spread = _spread(inner.to(weight.dtype), columns, weight.shape[1], 1)
        d_weight = _spread(spread, rows, weight.shape[0])
        if d_weight is gradient:
            d_weight = gradient.clone()
    return d_weight, d_row_scale, d_column_scale


def _run_forward(*arguments: Any) -> Tensor:
    selection = Selection(*arguments)
    device = selection.weight.device
    found: Tensor
    if registry.which(NAME, device) in _COMPILED:
        try:
            found = torch.ops.shorn.gather_scale_compiled.default(*selection)
        except RuntimeError as error:
            _explain(error, selection)
        return found
    module = registry.triton_module(NAME, device)
    if module is None:
        return _forward(selection)
    _check_all(selection)
    found = module.forward(selection)
    return found


def _run_backward(gradient: Tensor, *arguments: Any) -> Gradients:
    selection, needs = Selection(*arguments[:5]), arguments[5:]
    device = selection.weight.device
    found: Gradients
    if registry.which(NAME, device) in _COMPILED:
        run = torch.ops.shorn.gather_scale_backward_compiled.default
        try:
            found = run(gradient, *arguments)
        except RuntimeError as error:
            _explain(error, selection, gradient)
        return found
    module = registry.triton_module(NAME, device)
    if module is None:
        return _backward(gradient, *arguments)
    _check_all(selection, gradient)
    found = module.backward(gradient, selection, *needs)
    return found


def _explain(error: RuntimeError, selection: Selection, gradient: Tensor | None = None) -> NoReturn:
    """Raises what the Python checks say about the arguments that compiled code refused."""
    message = str(error).splitlines()[0]
    if not message.startswith(f"{NAME}: "):
        raise error
    _check(selection, gradient)
    raise ValueError(message)


def _select(values: Tensor, *indices: Tensor | None) -> Tensor:
    for dimension, index in enumerate(indices):
        values = values if index is None else values.index_select(dimension, index)
    return values


def _spread(values: Tensor, index: Tensor | None, size: int, dimension: int = 0) -> Tensor:
    """Zeros of length `size` along `dimension`, with `values` at `index`."""
    if index is None:
        return values
    shape = list(values.shape)
    shape[dimension] = size
    return values.new_zeros(shape).index_copy(dimension, index, values)


def _check(selection: Selection, gradient: Tensor | None = None) -> None:
    weight, rows, row_scale, columns, column_scale = selection
    device, wide = weight.device, wide_dtype(weight)
    if weight.dim() != 2 or weight.dtype not in FLOATING:
        refuse(NAME, "weight", "a floating-point matrix", weight)
    for name, index, scale, size in (
        ("row", rows, row_scale, weight.shape[0]),
        ("column", columns, column_scale, weight.shape[1]),
    ):
        count = 0 if index is None else index.numel()
        check_like(NAME, f"{name}s", index, (count,), (torch.int64,), device)
        check_like(NAME, f"{name}_scale", scale, (size,), (wide,), device)
    check_like(NAME, "gradient", gradient, selection.shape, (weight.dtype, wide), device)


def _check_all(selection: Selection, gradient: Tensor | None = None) -> None:
    """`_check`, and that indices are in range where they can be read without waiting."""
    _check(selection, gradient)
    weight, rows, _, columns, _ = selection
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, index, size in (("row", rows, weight.shape[0]), ("column", columns, weight.shape[1])):
        if index is not None and index.numel():
            wrong = index[(index < 0) | (index >= size)]
            if wrong.numel():
                raise ValueError(
                    f"{NAME}: {name} index {int(wrong[0])} is out of range for {size} {name}s"
                )


def _fake_forward(*arguments: Any) -> Tensor:
    selection = Selection(*arguments)
    _check(selection)
    return selection.weight.new_empty(selection.shape)


def _fake_backward(gradient: Tensor, *arguments: Any) -> Gradients:
    selection, needs = Selection(*arguments[:5]), arguments[5:]
    _check(selection, gradient)
    shape, dtype = selection.weight.shape, wide_dtype(selection.weight)
    return (
        gradient.new_empty(shape if needs[0] else (0,), dtype=selection.weight.dtype),
        gradient.new_empty(shape[0] if needs[1] else 0, dtype=dtype),
        gradient.new_empty(shape[1] if needs[2] else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _backward_of(ctx, torch.ops.shorn.gather_scale_backward, gradient)


def _backward_of(
    ctx: Any, run: Callable[..., Gradients], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
    d_weight, d_row_scale, d_column_scale = _gradients(run, gradient, ctx.saved_tensors, needs)
    return d_weight, None, d_row_scale, None, d_column_scale


class _GatherScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *selection: Any) -> Tensor:
        ctx.save_for_backward(*selection)
        return _run_forward(*selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _backward_of(ctx, _run_backward, *gradients)


_SELECTION = "Tensor weight, Tensor? rows, Tensor? row_scale, Tensor? columns, Tensor? column_scale"
_FORWARD = f"({_SELECTION}) -> Tensor"
_BACKWARD = (
    f"(Tensor gradient, {_SELECTION}, bool need_weight, bool need_row_scale, "
    "bool need_column_scale) -> (Tensor, Tensor, Tensor)"
)
registry.define(f"{NAME}{_FORWARD}", _run_forward, _fake_forward, _save, _differentiate)
registry.define(f"{NAME}_backward{_BACKWARD}", _run_backward, _fake_backward)
# Those of csrc/ get their implementations from the libraries.
registry.define(f"{NAME}_compiled{_FORWARD}", None, _fake_forward)
registry.define(f"{NAME}_backward_compiled{_BACKWARD}", None, _fake_backward)
library.load()
registry.register(registry.Operator(NAME, compiled=True))
