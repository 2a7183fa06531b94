import pytest
import torch
from torch import Tensor

from trainer.models.layers import Linear, RMSNorm, scale_rows_columns


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_scaling_gradients_equal_autograd_of_the_formula(rows: bool, columns: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    row_mask = torch.rand(5, dtype=torch.float64).mul(2).sub(1).relu().requires_grad_()
    column_mask = torch.rand(7, dtype=torch.float64).mul(2).sub(1).relu().requires_grad_()

    def scale(weight: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
        return scale_rows_columns(
            weight, row_mask if rows else None, column_mask if columns else None
        )

    assert torch.autograd.gradcheck(scale, (weight, row_mask, column_mask))


def test_scaling_without_masks_is_the_weight_itself() -> None:
    weight = torch.randn(3, 4)
    assert scale_rows_columns(weight, None, None) is weight


def test_scalar_rows_scale_weight_and_bias() -> None:
    layer = Linear(4, 3)
    x, factor = torch.randn(2, 4), torch.tensor(0.25, requires_grad=True)
    output = layer(x, factor)
    torch.testing.assert_close(output, 0.25 * layer(x))
    output.sum().backward()
    torch.testing.assert_close(factor.grad, layer(x).sum().detach())


def test_bf16_weights_round_once_and_masks_keep_fp32_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16().requires_grad_()
    mask = torch.rand(96).mul(0.9).add(0.1).requires_grad_()
    rows = torch.rand(64).mul(0.9).add(0.1).requires_grad_()
    scaled = scale_rows_columns(weight, rows, mask)
    assert scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, (weight * rows[:, None] * mask).bfloat16())
    gradient = torch.randn(64, 96).bfloat16()
    scaled.backward(gradient)
    exact = (gradient.double() * weight.double() * rows.double()[:, None]).sum(0)
    assert mask.grad is not None and mask.grad.dtype == torch.float32
    torch.testing.assert_close(mask.grad.double(), exact.detach(), rtol=1e-5, atol=1e-5)


def test_norm_over_live_dimensions_is_the_norm_of_the_smaller_model() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.3, 0.9], dtype=torch.float64)
    live = mask > 0
    x = torch.randn(4, 6, dtype=torch.float64) * live
    norm, small = RMSNorm(6, eps=0.1).double(), RMSNorm(4, eps=0.1).double()
    with torch.no_grad():
        norm.weight.normal_()
        small.weight.copy_((norm.weight * mask)[live])
    output = norm(x, mask, 6 / live.sum())
    torch.testing.assert_close(output[:, live], small(x[:, live]))
    assert torch.equal(output[:, ~live], torch.zeros(4, 2, dtype=torch.float64))
