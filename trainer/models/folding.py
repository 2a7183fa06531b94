"""Weights with masks folded in, restricted to the units that are computed.

W                                                          W'
. . . . .
. a . b c     rows 1, 3 times r1, r3              -->      a r1 c1   b r1 c3   c r1 c4
. . . . .     columns 1, 3, 4 times c1, c3, c4             d r3 c1   e r3 c3   f r3 c4
. d . e f

dW                                                         dW'
0 0 0 0 0
0 A 0 B C     A = x r1 c1, ...                    <--      x  y  z
0 0 0 0 0     dr1 = x a c1 + y b c3 + z c c4               u  v  w
0 D 0 E F     dc1 = x a r1 + u d r3
"""

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.gather_scale import gather_scale, gather_scale_backward


class Slot:
    """A folded weight and its gradient, kept over the passes of one mask draw.

    The gradient is passed on in the last of `passes` backward passes. If fewer came, it would never
    arrive, and FSDP's ranks would wait for it.
    """

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.value: Tensor | None = None
        self.gradient: Tensor | None = None

    def count(self) -> bool:
        """Counts one backward pass; whether it was the last."""
        assert self.passes > 0, "more backward passes than the masks were drawn for"
        self.passes -= 1
        return not self.passes

    def add(self, gradient: Tensor) -> Tensor | None:
        """Adds the gradient of one pass, in fp32 at least; returns the sum after the last."""
        last = self.count()
        if self.gradient is None:
            if last:
                return gradient
            self.gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        else:
            self.gradient += gradient
        if not last:
            return None
        total, self.gradient, self.value = self.gradient, None, None
        return total


class WeightCache:
    """The slots of one mask draw, made for a known number of forward and backward passes."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self._slots: dict[Hashable, Slot] = {}

    def slot(self, owner: Hashable) -> Slot:
        """The slot of a weight, identified by the module that owns it."""
        if owner not in self._slots:
            self._slots[owner] = Slot(self.passes)
        return self._slots[owner]


class Fold(NamedTuple):
    """Which rows and columns of a weight are used, and by what they are scaled."""

    rows: Tensor | None = None
    """[n] int64 rows, None for all."""
    row_scale: Tensor | None = None
    """[out] or scalar, fp32; None for ones."""
    columns: Tensor | None = None
    """[m] int64 columns, None for all."""
    column_scale: Tensor | None = None
    """[in] fp32; None for ones."""
    cache: WeightCache | None = None
    """Where the result is kept between passes; None: nowhere."""

    @property
    def trivial(self) -> bool:
        """Whether the weight is used as it is."""
        return all(part is None for part in self[:4])


class _FoldWeight(torch.autograd.Function):
    """W'[i, j] = W[r_i, c_j] z_r[r_i] z_c[c_j], and all gradients from one product.

    With y = W' x the gradients of the masks are the weighted row and column sums of W * dW', exact
    also where a mask is zero, so no activation has to be kept for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        rows: Tensor | None,
        row_scale: Tensor | None,
        columns: Tensor | None,
        column_scale: Tensor | None,
        slot: Slot | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, rows, row_scale, columns, column_scale)
        ctx.slot = slot
        if slot is None:
            return gather_scale(weight, rows, row_scale, columns, column_scale)
        if slot.value is None:
            slot.value = gather_scale(weight, rows, row_scale, columns, column_scale)
        return slot.value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.slot is not None:
            total = ctx.slot.add(gradient)
            if total is None:
                return (None,) * 6
            gradient = total
        weight, rows, row_scale, columns, column_scale = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        d_weight, d_rows, d_columns = gather_scale_backward(
            gradient, weight, rows, row_scale, columns, column_scale, needs
        )
        return d_weight, None, d_rows, None, d_columns, None


def fold_weight(weight: Tensor, fold: Fold, owner: Hashable) -> Tensor:
    """`weight` [out, in] restricted and scaled as `fold` says, in the weight's dtype.

    `owner` identifies the weight among those that share `fold.cache`.
    """
    if fold.trivial:
        return weight
    row_scale = fold.row_scale
    if row_scale is not None:
        row_scale = row_scale.expand(weight.shape[0])
    # Without gradients nothing would ever empty the slot.
    cache = fold.cache if torch.is_grad_enabled() else None
    slot = None if cache is None else cache.slot(owner)
    result: Tensor = _FoldWeight.apply(
        weight, fold.rows, row_scale, fold.columns, fold.column_scale, slot
    )
    return result


def fold_vector(vector: Tensor, units: Tensor | None, scale: Tensor | None) -> Tensor:
    """vector[units] * scale[units] in the vector's dtype; `scale` [n] or scalar, fp32."""
    if scale is not None:
        vector = (vector * scale).to(vector.dtype)
    return vector if units is None else vector.index_select(0, units)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Slot | None, *parameters: Tensor) -> Tensor:
        ctx.slot = slot
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        # A copy: FSDP's hooks do not work on views.
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.slot is not None and not ctx.slot.count():
            return (gradient, None, *(None for _ in ctx.like))
        zeros = [torch.zeros(shape, dtype=d, device=device) for shape, d, device in ctx.like]
        return (gradient, None, *zeros)


def zero_gradients(x: Tensor, parameters: Iterable[Tensor], slot: Slot | None) -> Tensor:
    """`x` itself; in the backward pass every parameter receives a gradient of zeros.

    A parameter without a gradient would be left out by the optimizer, whose moments would then not
    decay, and FSDP's ranks would disagree about what to reduce.
    """
    result: Tensor = _ZeroGradients.apply(x, slot, *parameters)
    return result
