"""Folded weights and their gradients against autograd of the formula."""

import pytest
import torch
from torch import Tensor

from trainer.models.folding import Fold, WeightCache, fold_vector, fold_weight, zero_gradients

ROWS, COLUMNS = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 5, 6])


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Weight [5, 7], row and column masks with zeros in them, fp64."""
    torch.manual_seed(0)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    rows = torch.rand(5, dtype=torch.float64).mul(2).sub(1).relu().requires_grad_()
    columns = torch.rand(7, dtype=torch.float64).mul(2).sub(1).relu().requires_grad_()
    return weight, rows, columns


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("selected", [True, False])
def test_gradients_equal_autograd_of_the_formula(rows: bool, columns: bool, selected: bool) -> None:
    def fold(weight: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
        what = Fold(
            ROWS if selected else None,
            row_mask if rows else None,
            COLUMNS if selected else None,
            column_mask if columns else None,
        )
        return fold_weight(weight, what, "owner")

    def formula(weight: Tensor, row_mask: Tensor, column_mask: Tensor) -> Tensor:
        scaled = weight * (row_mask[:, None] if rows else 1) * (column_mask if columns else 1)
        return scaled[ROWS][:, COLUMNS] if selected else scaled * 1

    inputs = _inputs()
    expected = formula(*inputs)
    upstream = torch.randn_like(expected)
    used = [inputs[0], *([inputs[1]] if rows else []), *([inputs[2]] if columns else [])]
    result = fold(*inputs)
    torch.testing.assert_close(result, expected)
    theirs = torch.autograd.grad(expected, used, upstream)
    for gradient, reference in zip(
        torch.autograd.grad(result, used, upstream), theirs, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_a_scalar_scales_all_rows() -> None:
    weight, _, _ = _inputs()
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    folded = fold_weight(weight, Fold(ROWS, factor), "owner")
    assert torch.equal(folded, weight[ROWS] * 0.5)
    folded.sum().backward()
    torch.testing.assert_close(factor.grad, weight[ROWS].sum().detach())


def test_without_masks_the_weight_itself_is_used() -> None:
    weight, _, _ = _inputs()
    assert fold_weight(weight, Fold(cache=WeightCache(2)), "owner") is weight


def test_bf16_weights_round_once_and_masks_keep_fp32_gradients() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96).bfloat16().requires_grad_()
    columns = torch.rand(96).mul(0.9).add(0.1).requires_grad_()
    rows = torch.rand(64).mul(0.9).add(0.1).requires_grad_()
    folded = fold_weight(weight, Fold(row_scale=rows, column_scale=columns), "owner")
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, (weight * rows[:, None] * columns).bfloat16())
    gradient = torch.randn(64, 96).bfloat16()
    folded.backward(gradient)
    exact = (gradient.double() * weight.double() * rows.double()[:, None]).sum(0)
    assert columns.grad is not None and columns.grad.dtype == torch.float32
    torch.testing.assert_close(columns.grad.double(), exact.detach(), rtol=1e-5, atol=1e-5)


def test_a_cache_folds_once_and_gives_the_summed_gradient_in_the_last_pass() -> None:
    weight, rows, columns = _inputs()
    leaves = [weight, rows, columns]
    upstream = torch.randn(3, 3, 4, dtype=torch.float64)
    plain = Fold(ROWS, rows, COLUMNS, columns)
    for gradient in upstream:
        fold_weight(weight, plain, "owner").backward(gradient)
    expected = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    cache = WeightCache(3)
    addresses = set()
    for number, gradient in enumerate(upstream):
        folded = fold_weight(weight, plain._replace(cache=cache), "owner")
        addresses.add(folded.data_ptr())
        folded.backward(gradient)
        assert (weight.grad is None) == (number < 2)
    assert len(addresses) == 1
    for leaf, reference in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, reference, rtol=1e-12, atol=1e-12)
    assert cache.slot("owner").value is None, "the folded weight must be freed"


def test_more_passes_than_announced_are_refused() -> None:
    weight, rows, _ = _inputs()
    fold = Fold(row_scale=rows, cache=WeightCache(1))
    fold_weight(weight, fold, "owner").sum().backward()
    with pytest.raises(AssertionError, match="more backward passes"):
        fold_weight(weight, fold, "owner").sum().backward()


def test_passes_without_gradients_do_not_count() -> None:
    weight, rows, _ = _inputs()
    cache = WeightCache(2)
    fold = Fold(row_scale=rows, cache=cache)
    with torch.no_grad():
        fold_weight(weight, fold, "owner")
    assert cache.slot("owner").value is None and cache.slot("owner").passes == 2


def test_cached_bf16_gradients_are_summed_in_fp32() -> None:
    weight = torch.ones(1, 1).bfloat16().requires_grad_()
    scale = torch.ones(1, requires_grad=True)
    cache = WeightCache(9)
    for value in (256.0, *[1.0] * 8):
        folded = fold_weight(weight, Fold(row_scale=scale, cache=cache), "owner")
        folded.backward(torch.tensor([[value]]).bfloat16())
    # bf16 cannot hold 257: summed in bf16 the ones would be lost.
    assert scale.grad is not None and scale.grad.item() == 264


def test_fold_vector() -> None:
    vector = torch.tensor([1.0, 2.0, 3.0]).bfloat16()
    units, scale = torch.tensor([0, 2]), torch.tensor([0.5, 0.0, 2.0])
    assert fold_vector(vector, None, None) is vector
    assert fold_vector(vector, units, scale).tolist() == [0.5, 6.0]
    assert fold_vector(vector, units, scale).dtype == torch.bfloat16
    assert fold_vector(vector, None, torch.tensor(0.5)).tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("passes", [None, 2])
def test_a_skipped_block_gets_zeros_in_the_last_pass(passes: int | None) -> None:
    parameters = [torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    slot = None if passes is None else WeightCache(passes).slot("block")
    x = torch.randn(5, requires_grad=True)
    for left in reversed(range(passes or 1)):
        y = zero_gradients(x, parameters, slot)
        assert torch.equal(y, x)
        y.sum().backward()
        for parameter in parameters:
            assert (parameter.grad is None) == (left > 0)
    assert x.grad is not None and torch.equal(x.grad, torch.full((5,), float(passes or 1)))
    for parameter in parameters:
        assert parameter.grad is not None and not parameter.grad.any()
