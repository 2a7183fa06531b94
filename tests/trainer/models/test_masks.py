"""Masks: what a block reads of them, and compact passes against dense ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.trainer.models.cases import CASES, pair, random_masks
from trainer.models.decoder import CausalLM
from trainer.models.folding import WeightCache
from trainer.models.masks import Masks

FULL = {"hidden": (48,), "layer": (3,), "head": (3, 6), "intermediate": (3, 80)}


def test_scale_counts_nonzero_dimensions() -> None:
    hidden = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.1], requires_grad=True)
    scale = Masks(hidden=hidden).stream().scale
    assert scale is not None and not scale.requires_grad
    assert scale.item() == torch.tensor(5 / 3).item()
    assert Masks().stream().scale is None
    for size in range(1, 200):
        scale = Masks(hidden=torch.ones(size)).stream().scale
        assert scale is not None and scale.item() == 1.0


def test_for_layer_picks_the_rows_of_one_block() -> None:
    masks = Masks(
        hidden=torch.tensor([1.0, 0.5]),
        layer=torch.tensor([0.2, 0.4]),
        head=torch.tensor([[1.0, 0.0], [0.3, 0.7]]),
        intermediate=torch.eye(2),
    )
    block = masks.for_layer(1, masks.stream())
    assert block.residual is not None
    assert torch.equal(block.residual, torch.tensor([0.4, 0.2]))
    columns = block.head_columns(3)
    assert columns is not None
    assert torch.equal(columns, torch.tensor([0.3, 0.3, 0.3, 0.7, 0.7, 0.7]))
    first = masks.for_layer(0, masks.stream()).intermediate
    assert first is not None and first.tolist() == [1.0, 0.0]


def test_absent_masks_stay_absent() -> None:
    masks = Masks(layer=torch.tensor([0.5]))
    block = masks.for_layer(0, masks.stream())
    assert block.stream.mask is None and block.stream.nonzero() is None
    assert block.head_columns(4) is None and block.intermediate is None
    assert block.residual is not None and block.residual.item() == 0.5
    assert Masks().for_layer(3, Masks().stream()).residual is None
    assert list(Masks(head=torch.ones(1, 1)).tensors()) == ["head"]


def test_moving_makes_masks_dense_again() -> None:
    config = pair("llama")[0].config
    masks = replace(random_masks(0).compact(config, multiple=4), cache=WeightCache(2)).to("cpu")
    assert masks.computed is None and masks.cache is None
    assert masks.tensors().keys() == FULL.keys()


def _soft(generator: torch.Generator, dtype: torch.dtype, nonzero: Tensor) -> Tensor:
    """Mid-range values where `nonzero`, zeros elsewhere; about a third of them are 1."""
    values = 0.1 + 1.2 * torch.rand(nonzero.shape, generator=generator, dtype=dtype)
    return (values.clamp(max=1.0) * nonzero).requires_grad_()


def _draw(kind: str, seed: int, dtype: torch.dtype, *, hold_scale: bool) -> Masks:
    """Masks of CASES' shape: `kind` says which units are nonzero."""
    generator = torch.Generator().manual_seed(seed)
    nonzero = {
        name: torch.rand(shape, generator=generator) < torch.rand((), generator=generator)
        for name, shape in FULL.items()
    }
    if kind == "all kept":
        nonzero = {name: torch.ones_like(flags) for name, flags in nonzero.items()}
    elif kind == "one kept":
        nonzero = {name: torch.zeros_like(flags) for name, flags in nonzero.items()}
        for flags in nonzero.values():
            units = torch.randint(flags.shape[-1], (*flags.shape[:-1], 1), generator=generator)
            flags.scatter_(-1, units, True)
        nonzero["hidden"][:3] = True  # a norm over a single dimension is constant
    elif kind == "no block":
        nonzero["layer"][:] = False
    elif kind == "empty blocks":
        nonzero["layer"][:] = True
        nonzero["head"][0] = False
        nonzero["intermediate"][1] = False
    elif kind == "uneven groups":
        nonzero["layer"][:] = True
        heads = [[1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]]
        nonzero["head"] = torch.tensor(heads) > 0
    elif kind in FULL:
        nonzero = {kind: nonzero[kind]}
    if "hidden" in nonzero:
        nonzero["hidden"][5:9] = True
    masks = {name: _soft(generator, dtype, flags) for name, flags in nonzero.items()}
    return Masks.of(masks, hold_scale=hold_scale)


KINDS = ["random", "all kept", "one kept", "no block", "empty blocks", "uneven groups", *FULL]
Result = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def _batches(number: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randint(0, 61, (2, 9), generator=generator),
            torch.randint(0, 61, (2, 9), generator=generator),
            torch.rand(2, 9, generator=generator, dtype=dtype),
        )
        for _ in range(number)
    ]


def _run(model: CausalLM, masks: Masks, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Result:
    """Losses, weight gradients and mask gradients, summed over the batches' backward passes."""
    leaves = masks.tensors()
    for leaf in (*model.parameters(), *leaves.values()):
        leaf.grad = None
    losses = []
    for ids, targets, weights in batches:
        output = model(ids, masks, targets, weights)
        output.loss.backward()
        losses.append(output.loss.item())
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    own = {name: z.grad.clone() for name, z in leaves.items() if z.grad is not None}
    return losses, gradients, own


def _require_equal(found: Result, dense: Result, masks: Masks, tolerance: float) -> None:
    """Relative to the norm of each gradient, or to a part of the largest where it is smaller: some
    vanish by symmetry (key biases) or are small sums of large terms (a block's mask), and are all
    rounding. Masks are compared where they are nonzero: elsewhere a clipped mask has no slope."""
    assert found[0] == pytest.approx(dense[0], rel=tolerance, abs=0)
    floor = (1e-3 if tolerance < 1e-9 else 0.1) * max(float(g.norm()) for g in dense[1].values())
    for name, theirs in dense[1].items():
        error = float((found[1][name] - theirs).norm())
        assert error <= tolerance * max(float(theirs.norm()), floor), (name, error)
    for name, z in masks.tensors().items():
        nonzero = z.detach() > 0
        ours, expected = found[2].get(name), dense[2][name]
        if ours is None:
            # No computed block uses this mask, so that nothing has a gradient for it.
            assert not (expected * nonzero).any()
            continue
        error = float((ours - expected)[nonzero].norm())
        assert error <= tolerance * max(float(expected[nonzero].norm()), floor), (name, error)


def _require_compact_equal(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, _ = pair(name, dtype)
    batches = _batches(1, dtype)
    number = list(CASES).index(name)
    for seed, kind in enumerate(KINDS):
        # Over the cases, every kind of masks meets both kinds of norms.
        masks = _draw(kind, seed, dtype, hold_scale=(number + seed) % 2 == 0)
        # Over the cases, every kind of masks meets every multiple.
        compact = masks.compact(model.config, multiple=(1, 4, 16)[(number + seed) % 3])
        dense = _run(model, masks, batches)
        _require_equal(_run(model, compact, batches), dense, masks, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_compact_passes_equal_dense_ones_in_fp64(name: str) -> None:
    _require_compact_equal(name, torch.float64, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_compact_passes_equal_dense_ones_in_fp32(name: str) -> None:
    _require_compact_equal(name, torch.float32, 1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("hold_scale", [False, True])
@pytest.mark.parametrize("name", ["llama-biases", "llama-tied-head-dim", "qwen3", "gpt_neox"])
def test_a_cache_over_three_passes_gives_the_sum_of_three(
    name: str, hold_scale: bool, checkpointed: bool
) -> None:
    model, _ = pair(name, torch.float64)
    batches = _batches(3, torch.float64)
    for seed, kind in enumerate(("random", "no block", "empty blocks")):
        masks = _draw(kind, 200 + seed, torch.float64, hold_scale=hold_scale)
        model.checkpoint_activations = False
        dense = _run(model, masks, batches)
        model.checkpoint_activations = checkpointed
        cached = replace(masks.compact(model.config, multiple=4), cache=WeightCache(3))
        _require_equal(_run(model, cached, batches), dense, masks, 1e-12)


def test_blocks_that_are_skipped_get_zeros_and_leave_the_stream_alone() -> None:
    for name in ("llama-biases", "gpt_neox"):
        model, _ = pair(name)
        masks = Masks(layer=torch.tensor([0.0, 0.7, 0.0], requires_grad=True))
        compact = masks.compact(model.config, multiple=4)
        _, gradients, _ = _run(model, compact, _batches(1, torch.float32))
        for key, gradient in gradients.items():
            skipped = f"{model.names.blocks}.0." in key or f"{model.names.blocks}.2." in key
            assert skipped == (not gradient.any()), key
