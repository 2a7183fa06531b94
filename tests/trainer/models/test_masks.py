import torch

from trainer.models.masks import Masks


def test_hidden_scale_counts_live_dimensions() -> None:
    hidden = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.1], requires_grad=True)
    scale = Masks(hidden=hidden).hidden_scale
    assert scale is not None and not scale.requires_grad
    assert scale.item() == torch.tensor(5 / 3).item()
    assert Masks().hidden_scale is None
    for size in range(1, 200):
        scale = Masks(hidden=torch.ones(size)).hidden_scale
        assert scale is not None and scale.item() == 1.0


def test_for_layer_picks_the_rows_of_one_block() -> None:
    masks = Masks(
        hidden=torch.tensor([1.0, 0.5]),
        layer=torch.tensor([0.2, 0.4]),
        head=torch.tensor([[1.0, 0.0], [0.3, 0.7]]),
        intermediate=torch.eye(2),
    )
    block = masks.for_layer(1)
    assert block.residual is not None
    assert torch.equal(block.residual, torch.tensor([0.4, 0.2]))
    columns = block.head_columns(3)
    assert columns is not None
    assert torch.equal(columns, torch.tensor([0.3, 0.3, 0.3, 0.7, 0.7, 0.7]))
    first = masks.for_layer(0).intermediate
    assert first is not None and first.tolist() == [1.0, 0.0]


def test_absent_families_stay_absent() -> None:
    block = Masks(layer=torch.tensor([0.5])).for_layer(0)
    assert block.hidden is None and block.head_columns(4) is None and block.intermediate is None
    assert block.residual is not None and block.residual.item() == 0.5
    assert Masks().for_layer(3).residual is None
    assert list(Masks(head=torch.ones(1, 1)).tensors()) == ["head"]
