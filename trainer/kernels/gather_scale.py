"""Gather-scale: the live part of a weight with its masks folded in, and all gradients of it.

W'[i, j] = W[r_i, c_j] * z_r[r_i] * z_c[c_j]. With y = W' x the gradients of the masks are the
weighted row and column sums of W * dW', exact also where a mask is zero, so that no activation has
to be kept for them. Units left out have mask 0 and receive a zero gradient.

`shorn::gather_scale` and `shorn::gather_scale_backward` are PyTorch operators: the functions below
the schemas here are their reference, csrc/gather_scale.{cpp,cu} their compiled implementations.
Triton's are operators of their own, `shorn::gather_scale_triton` and its backward: where compiled
code is loaded, it takes the place of anything else behind the first two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.kernels import library, registry
from trainer.kernels.arguments import FLOATING, wide_dtype

NAME = "gather_scale"

Needs = tuple[bool, bool, bool]

_SELECTION = "Tensor weight, Tensor? rows, Tensor? row_scale, Tensor? columns, Tensor? column_scale"


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
    _check(weight, rows, row_scale, columns, column_scale)
    return _call(_forward, weight.device, weight, rows, row_scale, columns, column_scale)


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
    _check(weight, rows, row_scale, columns, column_scale)
    _check_gradient(gradient, weight, rows, columns)
    wanted = (needs[0], needs[1] and row_scale is not None, needs[2] and column_scale is not None)
    selection = (rows, row_scale, columns, column_scale)
    found = _call(_backward, weight.device, gradient, weight, *selection, *wanted)
    d_weight, d_row_scale, d_column_scale = (
        tensor if want else None for tensor, want in zip(found, wanted, strict=True)
    )
    return d_weight, d_row_scale, d_column_scale


def _call(
    reference: Callable[..., Any], device: torch.device, *arguments: Tensor | bool | None
) -> Any:
    """The operator whose reference is given, or the reference itself where that is asked for."""
    if registry.runs_reference(NAME, device):
        return reference(*arguments)
    triton = registry.which(NAME, device) == "triton"
    try:
        return _OPERATORS[reference, triton](*arguments)
    except RuntimeError as error:
        # Compiled code can only throw this; its first line is the message.
        message = str(error).splitlines()[0]
        if message.startswith("gather_scale: "):
            raise ValueError(message) from None
        raise


def _forward(
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
) -> Tensor:
    _check_indices(weight, rows, columns)
    selected = _select(weight, rows, columns)
    if row_scale is not None:
        selected = selected * _select(row_scale, rows).unsqueeze(1)
    if column_scale is not None:
        selected = selected * _select(column_scale, columns)
    if selected is weight:
        return weight.clone(memory_format=torch.contiguous_format)
    return selected.to(weight.dtype).contiguous()


def _backward(
    gradient: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
    need_weight: bool,
    need_row_scale: bool,
    need_column_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that are not needed are empty tensors [0]."""
    _check_indices(weight, rows, columns)
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


def _forward_triton(
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
) -> Tensor:
    _check(weight, rows, row_scale, columns, column_scale)
    module = registry.triton_module(NAME, weight.device)
    if module is None:
        return _forward(weight, rows, row_scale, columns, column_scale)
    _check_indices(weight, rows, columns)
    found: Tensor = module.forward(weight, rows, row_scale, columns, column_scale)
    return found


def _backward_triton(
    gradient: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(weight, rows, row_scale, columns, column_scale)
    _check_gradient(gradient, weight, rows, columns)
    selection = (rows, row_scale, columns, column_scale)
    module = registry.triton_module(NAME, weight.device)
    if module is None:
        return _backward(gradient, weight, *selection, *needs)
    _check_indices(weight, rows, columns)
    found: tuple[Tensor, Tensor, Tensor] = module.backward(gradient, weight, *selection, *needs)
    return found


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


def _check(
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
) -> None:
    if weight.dim() != 2 or weight.dtype not in FLOATING:
        raise ValueError(
            f"gather_scale: weight must be a floating-point matrix, got {_describe(weight)}"
        )
    dtype = wide_dtype(weight)
    for name, index, scale, size in (
        ("row", rows, row_scale, weight.shape[0]),
        ("column", columns, column_scale, weight.shape[1]),
    ):
        if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
            raise ValueError(f"gather_scale: {name}s must be [n] int64, got {_describe(index)}")
        if scale is not None and (scale.shape != (size,) or scale.dtype != dtype):
            raise ValueError(
                f"gather_scale: {name}_scale must be [{size}] {dtype} for a weight "
                f"{_describe(weight)}, got {_describe(scale)}"
            )
    for tensor in (rows, row_scale, columns, column_scale):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"gather_scale: all tensors must be on the weight's device {weight.device}, "
                f"got one on {tensor.device}"
            )


def _check_gradient(
    gradient: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None
) -> None:
    shape = (
        weight.shape[0] if rows is None else rows.shape[0],
        weight.shape[1] if columns is None else columns.shape[0],
    )
    fits = gradient.dtype in (weight.dtype, wide_dtype(weight))
    if gradient.shape != shape or not fits or gradient.device != weight.device:
        raise ValueError(
            f"gather_scale: gradient must be {list(shape)} {weight.dtype} or "
            f"{wide_dtype(weight)} on {weight.device}, got {_describe(gradient)} "
            f"on {gradient.device}"
        )


def _check_indices(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    """Refuses indices out of range where they can be read, and without synchronisation."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, index, size in (("row", rows, weight.shape[0]), ("column", columns, weight.shape[1])):
        if index is not None and index.numel():
            wrong = index[(index < 0) | (index >= size)]
            if wrong.numel():
                raise ValueError(
                    f"gather_scale: {name} index {int(wrong[0])} is out of range for {size} {name}s"
                )


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _fake_forward(
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
) -> Tensor:
    return weight.new_empty(
        weight.shape[0] if rows is None else rows.shape[0],
        weight.shape[1] if columns is None else columns.shape[0],
    )


def _fake_backward(
    gradient: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    row_scale: Tensor | None,
    columns: Tensor | None,
    column_scale: Tensor | None,
    need_weight: bool,
    need_row_scale: bool,
    need_column_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows_out, columns_out = weight.shape
    dtype = wide_dtype(weight)
    return (
        weight.new_empty((rows_out, columns_out) if need_weight else (0,)),
        weight.new_empty(rows_out if need_row_scale else 0, dtype=dtype),
        weight.new_empty(columns_out if need_column_scale else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
    weight, rows, row_scale, columns, column_scale = ctx.saved_tensors
    d_weight, d_row_scale, d_column_scale = gather_scale_backward(
        gradient, weight, rows, row_scale, columns, column_scale, needs
    )
    return d_weight, None, d_row_scale, None, d_column_scale


def _register() -> dict[tuple[Callable[..., Any], bool], Callable[..., Any]]:
    """Defines the operators; the reference of each runs on devices without a compiled one."""
    for suffix, forward, backward in (
        ("", _forward, _backward),
        ("_triton", _forward_triton, _backward_triton),
    ):
        schemas = (
            f"gather_scale{suffix}({_SELECTION}) -> Tensor",
            f"gather_scale_backward{suffix}(Tensor gradient, {_SELECTION}, bool need_weight, "
            "bool need_row_scale, bool need_column_scale) -> (Tensor, Tensor, Tensor)",
        )
        registry.define(_LIBRARY, schemas[0], forward, _fake_forward)
        registry.define(_LIBRARY, schemas[1], backward, _fake_backward)
        torch.library.register_autograd(
            f"shorn::gather_scale{suffix}", _differentiate, setup_context=_save, lib=_LIBRARY
        )
    library.load()
    registry.register(
        registry.Operator(NAME, _forward, "trainer.kernels.gather_scale_triton", compiled=True)
    )
    return {
        (_forward, False): torch.ops.shorn.gather_scale,
        (_forward, True): torch.ops.shorn.gather_scale_triton,
        (_backward, False): torch.ops.shorn.gather_scale_backward,
        (_backward, True): torch.ops.shorn.gather_scale_backward_triton,
    }


_LIBRARY = torch.library.Library("shorn", "FRAGMENT")
_OPERATORS = _register()
