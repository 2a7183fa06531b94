"""Kinds of units, their rows, and which units are on."""

import torch

from pruner.shapes import Shape
from pruner.units import (
    indicator,
    kept_indices,
    on_counts,
    polarised,
    to_masks,
    top_units,
    unit_kinds,
)

SOURCE = Shape(layers=3, hidden=12, heads=6, kv_heads=3, head_dim=2, ffn=10)
TARGET = Shape(layers=2, hidden=8, heads=2, kv_heads=2, head_dim=2, ffn=5)


def test_kinds_have_one_row_per_independent_choice() -> None:
    kinds = unit_kinds(TARGET, SOURCE)
    sizes = {name: (f.rows, f.units, f.target) for name, f in kinds.items()}
    assert sizes == {
        "hidden": (1, 12, 8),
        "layer": (1, 3, 2),
        "kv_group": (3, 3, 2),
        "query_head": (9, 2, 1),
        "intermediate": (3, 10, 5),
    }


def test_only_pruned_kinds_exist() -> None:
    kinds = unit_kinds(Shape(3, 12, 4, 2, 2, 10), SOURCE)
    assert list(kinds) == ["kv_group"]
    masks = to_masks({"kv_group": torch.ones(3, 3)}, SOURCE)
    assert masks.head is not None and masks.head.shape == (3, 6)
    assert masks.hidden is None and masks.layer is None and masks.intermediate is None


def test_head_mask_is_group_times_query_head() -> None:
    z = {"kv_group": torch.rand(3, 3), "query_head": torch.rand(9, 2)}
    head = to_masks(z, SOURCE).head
    assert head is not None
    for layer in range(3):
        for query in range(6):
            group = query // 2
            own = z["query_head"][layer * 3 + group, query % 2]
            assert head[layer, query] == z["kv_group"][layer, group] * own


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert top_units(scores, 2).tolist() == [[0, 1], [0, 1]]
    assert indicator(scores, 3).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]


def test_counts_indices_and_polarisation() -> None:
    kinds = unit_kinds(Shape(3, 12, 6, 3, 2, 2), SOURCE)
    z = torch.zeros(3, 10)
    z[:, [1, 7]] = 1.0
    assert polarised({"intermediate": z}, kinds)
    assert kept_indices(z).tolist() == [[1, 7]] * 3
    for value, index in ((0.98, 1), (0.02, 0), (1.0, 0)):
        changed = z.clone()
        changed[2, index] = value
        assert not polarised({"intermediate": changed}, kinds)
    changed = z.clone()
    changed[0, 1] = 0.5
    assert on_counts(changed).tolist() == [1, 2, 2]
