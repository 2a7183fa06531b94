"""Masked linear layers and norms against those of the smaller model."""

import math

import pytest
import torch
from torch import Tensor, nn

from trainer.models.folding import Fold
from trainer.models.layers import LayerNorm, Linear, RMSNorm
from trainer.models.masks import Masks, StreamMasks


def test_linear_computes_the_chosen_outputs_from_the_chosen_inputs() -> None:
    torch.manual_seed(0)
    layer = Linear(5, 4).double()
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    row_scale, column_scale = torch.rand(4).double(), torch.rand(5).double()
    x = torch.randn(2, 3).double()
    output = layer(x, Fold(rows, row_scale, columns, column_scale))
    whole = torch.zeros(2, 5).double().index_copy(1, columns, x)
    expected = layer(whole * column_scale) * row_scale
    torch.testing.assert_close(output, expected[:, rows])


def test_scalar_rows_scale_weight_and_bias() -> None:
    layer = Linear(4, 3)
    x, factor = torch.randn(2, 4), torch.tensor(0.25, requires_grad=True)
    output = layer(x, Fold(row_scale=factor))
    torch.testing.assert_close(output, 0.25 * layer(x))
    output.sum().backward()
    torch.testing.assert_close(factor.grad, layer(x).sum().detach())


MASK = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.3, 0.9], dtype=torch.float64)


def _stream(kind: str, hold_scale: bool) -> StreamMasks:
    """Masks of six dimensions of which two are 0: all computed, or one of the two left out."""
    stream = Masks(hidden=MASK, hold_scale=hold_scale).stream()
    if kind == "dense":
        return stream
    units = torch.tensor([1, 2, 3, 4, 5])
    return StreamMasks(MASK, units, torch.tensor(5 / 4, dtype=torch.float64), stream.gain)


@pytest.mark.parametrize("kind", ["dense", "padded"])
@pytest.mark.parametrize("hold_scale", [False, True])
@pytest.mark.parametrize("ours", [RMSNorm, LayerNorm])
def test_norm_over_nonzero_dimensions_is_the_norm_of_the_smaller_model(
    ours: type[RMSNorm | LayerNorm], hold_scale: bool, kind: str
) -> None:
    torch.manual_seed(0)
    stream, nonzero = _stream(kind, hold_scale), MASK > 0
    norm, small = ours(6, 0.1).double(), ours(4, 0.1).double()
    with torch.no_grad():
        for large, part in zip(norm.parameters(), small.parameters(), strict=True):
            large.normal_()
            part.copy_((large * MASK)[nonzero])
        if hold_scale:
            small.weight.mul_(math.sqrt(6 / 4))
    whole = (torch.randn(3, 4, 6, dtype=torch.float64) + 2) * nonzero
    units = torch.arange(6) if stream.units is None else stream.units
    x = whole[..., units].requires_grad_()
    output = norm(x, stream)
    kept = nonzero[units]
    smaller = whole[..., nonzero].requires_grad_()
    expected = small(smaller)
    torch.testing.assert_close(output[..., kept], expected, rtol=1e-12, atol=1e-12)
    assert not output[..., ~kept].any(), "dimensions with mask 0 must stay exactly 0"
    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream[..., kept])
    assert x.grad is not None and not x.grad[..., ~kept].any()
    torch.testing.assert_close(x.grad[..., kept], smaller.grad, rtol=1e-12, atol=1e-12)


def test_held_scale_is_that_of_a_norm_over_all_dimensions() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6, 0.0).double()
    nonzero = (MASK > 0).double()
    x = torch.randn(5, 6, dtype=torch.float64) * nonzero
    found = norm(x, Masks(hidden=nonzero, hold_scale=True).stream())
    torch.testing.assert_close(found, norm(x), rtol=1e-12, atol=1e-12)


def test_unmasked_layer_norm_is_torch_layer_norm() -> None:
    torch.manual_seed(0)
    norm, reference = LayerNorm(16, 1e-5), nn.LayerNorm(16, 1e-5)
    x = torch.randn(2, 3, 16)
    for values in (x, x.bfloat16()):
        norm.to(values.dtype)
        reference.to(values.dtype)
        assert torch.equal(norm(values), reference(values))
        assert torch.equal(norm(values, StreamMasks()), reference(values))


def test_layer_norm_keeps_its_precision_far_from_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 256) + 1000
    norm = LayerNorm(256, 1e-5)
    masked: Tensor = norm(x, Masks(hidden=torch.ones(256)).stream())
    exact = nn.functional.layer_norm(x.double(), (256,))
    assert (masked - exact).abs().max() < 1e-3


@pytest.mark.parametrize("ours", [RMSNorm, LayerNorm])
def test_bf16_statistics_are_taken_in_fp32(ours: type[RMSNorm | LayerNorm]) -> None:
    torch.manual_seed(0)
    hidden = (torch.rand(256) > 0.3) * torch.rand(256).clamp(min=0.1)
    stream = Masks(hidden=hidden).stream()
    x = (torch.randn(8, 256) * (hidden > 0)).bfloat16()
    norm = ours(256, 1e-5)
    exact = norm.double()(x.double(), Masks(hidden=hidden.double()).stream())
    found = norm.bfloat16()(x, stream)
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 0.02 * exact.abs() + 1e-6).all()
