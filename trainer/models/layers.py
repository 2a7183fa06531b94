"""Layers whose masks are folded into their weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _ScaleRowsColumns(torch.autograd.Function):
    """W' = diag(rows) W diag(columns), rounded to W's dtype; both mask gradients from one product.

    With y = W' x the gradients of the masks are the weighted row and column sums of W * dW', exact
    also where a mask is zero, so no activation has to be kept for them.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, rows, columns)
        scaled = weight
        if rows is not None:
            scaled = scaled * rows.unsqueeze(-1)
        if columns is not None:
            scaled = scaled * columns
        return scaled.to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        weight, rows, columns = ctx.saved_tensors
        needs_weight, needs_rows, needs_columns = ctx.needs_input_grad
        d_weight = d_rows = d_columns = None
        if needs_rows or needs_columns:
            mask = rows if rows is not None else columns
            product = gradient.to(torch.promote_types(gradient.dtype, mask.dtype)) * weight
            if needs_rows:
                total = product.sum(1) if columns is None else product @ columns.to(product.dtype)
                d_rows = total.to(rows.dtype)
            if needs_columns:
                total = product.sum(0) if rows is None else rows.to(product.dtype) @ product
                d_columns = total.to(columns.dtype)
        if needs_weight:
            d_weight = gradient if rows is None else gradient * rows.unsqueeze(-1)
            d_weight = d_weight if columns is None else d_weight * columns
            d_weight = d_weight.to(weight.dtype)
        return d_weight, d_rows, d_columns


def scale_rows_columns(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """diag(rows) weight diag(columns) in the dtype of `weight`.

    Args:
        weight: [out, in].
        rows: [out] or scalar factor of the outputs, fp32; None for ones.
        columns: [in] factor of the inputs, fp32; None for ones.
    """
    if rows is None and columns is None:
        return weight
    if rows is not None:
        rows = rows.expand(weight.shape[0])
    result: Tensor = _ScaleRowsColumns.apply(weight, rows, columns)
    return result


class Linear(nn.Linear):
    """nn.Linear that can take masks of its outputs and inputs."""

    def forward(
        self, x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """x [..., in] -> [..., out]; `rows` also scales the bias."""
        weight = scale_rows_columns(self.weight, rows, columns)
        bias: Tensor | None = self.bias
        if bias is not None and rows is not None:
            bias = (bias * rows).to(bias.dtype)
        return F.linear(x, weight, bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with statistics over the live dimensions only."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Normalise the last dimension of x [..., d].

        Args:
            x: dimensions with mask 0 must hold 0: they then add nothing to the sum of squares.
            mask: [d] factor of the gain, None for ones.
            scale: scalar d / n for n live dimensions; turns the mean over d into one over n.
        """
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        mean_square = values.square().mean(-1, keepdim=True)
        if scale is not None:
            mean_square = mean_square * scale
        gain = self.weight if mask is None else (self.weight * mask).to(self.weight.dtype)
        return gain * (values * torch.rsqrt(mean_square + self.eps)).to(x.dtype)
