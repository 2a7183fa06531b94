"""The computed units: all nonzero ones, as little padding as fits, and their FLOPs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.models.cases import CASES
from trainer.models.computed import (
    computed_flops,
    computed_heads,
    expand,
    find_computed_units,
    padded_units,
)
from trainer.models.config import ModelConfig

flags = st.lists(st.booleans(), min_size=1, max_size=70).map(lambda bits: np.array(bits))


@given(nonzero=flags, multiple=st.sampled_from([1, 4, 16, 100]))
def test_padded_units_hold_all_nonzero_ones_and_as_few_others_as_fit(
    nonzero: np.ndarray, multiple: int
) -> None:
    units = padded_units(nonzero, multiple)
    needed = np.flatnonzero(nonzero)
    if units is None:
        # Padding would have reached the end.
        assert max(1, -(-len(needed) // multiple)) * multiple >= len(nonzero)
        return
    assert len(units) % multiple == 0 and len(units) < len(nonzero)
    assert len(units) - max(len(needed), 1) < multiple
    assert (np.diff(units) > 0).all() and set(needed) <= set(units)
    padding = [unit for unit in units if not nonzero[unit]]
    assert padding == list(np.flatnonzero(~nonzero)[: len(padding)])


@given(
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    p=st.floats(0, 1),
)
def test_computed_heads_are_the_smallest_uniform_set(
    kv_heads: int, group: int, seed: int, p: float
) -> None:
    nonzero = np.random.default_rng(seed).random(kv_heads * group) < p
    counts = nonzero.reshape(kv_heads, group).sum(1)
    chosen = computed_heads(nonzero, kv_heads)
    smallest = max(1, int(counts.max())) * max(1, int((counts > 0).sum()))
    if chosen is None:
        assert smallest == len(nonzero)
        return
    heads, groups = chosen
    assert len(heads) == smallest
    assert (np.diff(heads) > 0).all() and set(np.flatnonzero(nonzero)) <= set(heads)
    owners, members = np.unique(heads // group, return_counts=True)
    assert list(owners) == list(groups)
    assert set(np.flatnonzero(counts)) <= set(groups)
    assert len(set(members)) == 1


@given(st.lists(st.integers(0, 9), unique=True, min_size=1).map(sorted), st.integers(1, 8))
def test_expand_lists_every_channel(heads: list[int], width: int) -> None:
    expected = [head * width + channel for head in heads for channel in range(width)]
    assert expand(np.array(heads), width).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.floats(0.05, 0.95), neox=st.booleans())
def test_computed_units_come_back_as_they_were_chosen(seed: int, p: float, neox: bool) -> None:
    config = ModelConfig.from_hf(CASES["gpt_neox" if neox else "llama"])
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: (torch.rand(shape, generator=generator) < p).float() * 0.5
        for name, shape in {
            "hidden": (48,),
            "layer": (3,),
            "head": (3, 6),
            "intermediate": (3, 80),
        }.items()
    }
    computed = find_computed_units(masks, config, 4)
    nonzero = {name: (z > 0).numpy() for name, z in masks.items()}

    def same(found: torch.Tensor | None, expected: np.ndarray | None) -> bool:
        if found is None or expected is None:
            return found is None and expected is None
        return found.dtype == torch.int64 and found.tolist() == expected.tolist()

    assert same(computed.hidden, padded_units(nonzero["hidden"], 4))
    for index, units in enumerate(computed.layers):
        assert units.skipped == (not nonzero["layer"][index])
        if units.skipped:
            assert units == units._replace(queries=None, keys=None, fused=None, channels=None)
            continue
        assert same(units.channels, padded_units(nonzero["intermediate"][index], 4))
        chosen = computed_heads(nonzero["head"][index], config.num_kv_heads)
        heads, groups = (None, None) if chosen is None else chosen
        width = config.head_dim
        assert same(units.queries, None if heads is None else expand(heads, width))
        assert same(units.keys, None if groups is None or neox else expand(groups, width))
        fused = None if heads is None or not neox else expand(heads, 3 * width)
        assert same(units.fused, fused)


def test_absent_masks_leave_everything_computed() -> None:
    config = ModelConfig.from_hf(CASES["llama"])
    computed = find_computed_units({}, config, 4)
    assert computed.hidden is None and len(computed.layers) == 3
    only = find_computed_units({"layer": torch.tensor([1.0, 0.0, 1.0])}, config, 4)
    assert [units.skipped for units in only.layers] == [False, True, False]
    assert only.hidden is None and only.layers[0].channels is None
    deeper = find_computed_units({"hidden": torch.ones(48)}, replace(config, num_layers=5), 4)
    assert deeper.hidden is None and len(deeper.layers) == 5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_computed_flops_are_those_of_the_smaller_model(name: str) -> None:
    config = ModelConfig.from_hf(CASES[name])
    all_units = find_computed_units({}, config, 4)
    for causal in (False, True):
        expected = config.flops_per_token(64, causal)
        assert computed_flops(config, all_units, 64, causal) == pytest.approx(expected)
    head = torch.ones(3, 6)
    head[:, 3:] = 0
    masks = {
        "hidden": (torch.arange(48) < 32).float(),
        "layer": torch.tensor([1.0, 0.0, 1.0]),
        "head": head,
        "intermediate": (torch.arange(80) % 2).float().expand(3, 80),
    }
    kv_heads = 3 if config.num_kv_heads == 6 else 1
    small = replace(
        config,
        hidden_size=32,
        num_layers=2,
        num_heads=3,
        num_kv_heads=kv_heads,
        intermediate_size=40,
    )
    found = computed_flops(config, find_computed_units(masks, config, 4), 64, True)
    assert found == pytest.approx(small.flops_per_token(64, True))
