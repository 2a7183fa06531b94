"""Layers whose masks are folded into their weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.rms_norm import rms_norm
from trainer.models.folding import Fold, fold_vector, fold_weight, zero_gradients
from trainer.models.masks import StreamMasks


class Linear(nn.Linear):
    """nn.Linear that computes some of its outputs from some of its inputs, scaled by masks."""

    def forward(self, x: Tensor, fold: Fold | None = None) -> Tensor:
        """x [..., m] -> [..., n], for the m inputs and n outputs that `fold` selects (None: all).

        `fold.row_scale` also scales the bias.
        """
        if fold is None:
            return F.linear(x, self.weight, self.bias)
        weight = fold_weight(self.weight, fold, self)
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = fold_vector(bias, fold.rows, fold.row_scale)
        return F.linear(x, weight, bias)


def skip_block(block: nn.Module, x: Tensor, stream: StreamMasks) -> Tensor:
    """What a block whose mask is 0 returns: its input x, and zeros as its parameters' gradients."""
    return skip_layer(x, stream, block)


def skip_layer(x: Tensor, stream: StreamMasks, *modules: nn.Module) -> Tensor:
    """As `skip_block`, for `modules` that are a part of one."""
    slot = None if stream.cache is None else stream.cache.slot(modules[-1])
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return zero_gradients(x, parameters, slot)


class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450) with statistics over the nonzero dimensions only."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor, stream: StreamMasks | None = None) -> Tensor:
        """Normalise the last dimension of x [..., m]; gain and bias both carry the masks.

        `stream` holds the masks of x's dimensions (None: all ones); those with mask 0 do not enter
        mean and variance, and are 0 in the result.
        """
        nonzero = None if stream is None else stream.nonzero()
        if stream is None or nonzero is None:
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        share = nonzero.to(values.dtype)
        share = share / share.sum().clamp(min=1)
        centred = values - (values * share).sum(-1, keepdim=True)
        variance = (centred.square() * share).sum(-1, keepdim=True)
        normed = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
        gain = fold_vector(self.weight, stream.units, stream.norm_scale())
        bias = fold_vector(self.bias, stream.units, stream.mask)
        return torch.addcmul(bias, normed, gain)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) with statistics over the nonzero dimensions only."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, stream: StreamMasks | None = None) -> Tensor:
        """Normalise the last dimension of x [..., m].

        `stream` holds the masks of x's dimensions (None: all ones); those with mask 0 must hold 0
        in x: they then add nothing to the sum of squares.
        """
        return self.add(x, None, stream)[0]

    def add(
        self, x: Tensor, update: Tensor | None, stream: StreamMasks | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + update [..., m], and that sum; see `forward`."""
        gain: Tensor = self.weight
        scale = None
        if stream is not None:
            gain, scale = fold_vector(gain, stream.units, stream.norm_scale()), stream.scale
        return rms_norm(x, gain, self.eps, residual=update, scale=scale)
