"""Shapes proposed for a budget are valid, use it and keep proportions."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from data.errors import InputError
from pruner.budget import (
    SHARE,
    Budget,
    alternatives,
    multiple,
    parse_budget,
    propose,
    smallest,
)
from pruner.shapes import Shape, config_of, parse_target, shape_of, validate
from trainer.models.config import ModelConfig


def model(
    family: str, sizes: tuple[int, int, int, int, int, int], vocabulary: int, tied: bool
) -> ModelConfig:
    layers, hidden, heads, kv_heads, head_dim, ffn = sizes
    return ModelConfig(
        family=family,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_embeddings=tied,
        qkv_bias=family in ("qwen2", "gpt_neox"),
        output_bias=family == "gpt_neox",
        mlp_bias=family == "gpt_neox",
        activation="gelu" if family == "gpt_neox" else "silu",
        rotary_fraction=0.25 if family == "gpt_neox" else 1.0,
        parallel_residual=family == "gpt_neox",
    )


LLAMA2_7B = model("llama", (32, 4096, 32, 32, 128, 11008), 32000, False)
SOURCES = {
    "llama-2-7b": LLAMA2_7B,
    "llama-3-8b": model("llama", (32, 4096, 32, 8, 128, 14336), 128256, False),
    "smollm2-135m": model("llama", (30, 576, 9, 3, 64, 1536), 49152, True),
    "qwen2.5-0.5b": model("qwen2", (24, 896, 14, 2, 64, 4864), 151936, True),
    "pythia-410m": model("gpt_neox", (24, 1024, 16, 16, 64, 4096), 50304, False),
    "demo": model("llama", (3, 32, 4, 2, 8, 48), 259, True),
}


def parameters(config: ModelConfig) -> float:
    return float(config.num_parameters())


def block_parameters(config: ModelConfig) -> float:
    return float(config.num_parameters(embeddings=False))


@pytest.mark.parametrize(
    ("text", "kind", "amount", "fixed"),
    [
        ("params=70m", "params", 70_000_000, {}),
        ("params=1.3B", "params", 1_300_000_000, {}),
        (" Params = 70_000_000 ", "params", 70_000_000, {}),
        ("params=512k,layers=24", "params", 512_000, {"layers": 24}),
        ("ffn=64, params-non-embedding=46m", "params-non-embedding", 46_000_000, {"ffn": 64}),
        ("params_non_embedding=46m", "params-non-embedding", 46_000_000, {}),
        ("speedup=1.5", "speedup", 1.5, {}),
    ],
)
def test_budgets(text: str, kind: str, amount: float, fixed: dict[str, int]) -> None:
    budget = parse_budget(text)
    assert budget is not None
    assert (budget.kind, budget.amount, budget.fixed) == (kind, amount, fixed)


def test_the_text_of_a_budget_does_not_depend_on_spaces_or_case() -> None:
    budget = Budget("params=1m,layers=2", "params", 10**6, {"layers": 2})
    assert parse_budget(" Params=1M, layers = 2") == budget


@pytest.mark.parametrize(
    ("text", "spelled"),
    [("70m", "params=70m"), (" 1.4B ", "params=1.4b"), ("layers=24, 70m", "layers=24,params=70m")],
)
def test_a_number_of_parameters_alone_is_a_budget(text: str, spelled: str) -> None:
    """Resuming does not depend on how it was spelled."""
    found = parse_budget(text)
    assert found is not None and found == parse_budget(spelled)


@pytest.mark.parametrize(
    "text", ["1.3b", "370M", "pythia-160m", "70", "layers=24,hidden=432", "ffn=8", "nonsense"]
)
def test_a_named_shape_is_no_budget(text: str) -> None:
    assert parse_budget(text) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params=abc", r"params='abc' is not a number of parameters: write.*params=70m"),
        ("params", r"params='' is not a number"),
        ("params=0", r"params='0' is not a number"),
        (f"params={'9' * 400}b", r"9b' is not a number of parameters"),
        ("params=-5m", r"params='-5m' is not a number"),
        ("params-non-embedding=7x", r"params-non-embedding=70000000"),
        ("speedup=fast", r"speedup='fast' is not a number: write for example speedup=2"),
        ("speedup=nan", r"speedup='nan' is not a number"),
        ("speedup=1", r"speedup=1 asks for nothing faster.*above 1"),
        ("speedup=0.5", r"speedup=0.5 asks for nothing faster"),
        ("params=1m,speedup=2", r"gives 2 budgets: give one, params=1m"),
        ("params=1m,2m", r"gives 2 budgets"),
        ("2m,370m", r"the preset 370m fixes every size, which leaves nothing to params=2m"),
        ("params=1m,1.3b", r"the preset 1.3b fixes every size"),
        ("params=1m,width=3", r"'width=3' is neither a preset .*a budget: params=1.3b"),
        ("params=1m,ffn=many", r"ffn='many' is not a whole number"),
    ],
)
def test_malformed_budgets_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        parse_budget(text)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95])
def test_alternatives_reach_as_far_as_the_proposal(share: float) -> None:
    """Also where the steps between shapes are too coarse for any to use most of the budget."""
    source = SOURCES["demo"]
    limit = share * block_parameters(source)
    fixed = {"hidden": 32, "heads": 4, "kv-heads": 2, "ffn": 48}
    proposal = propose(source, block_parameters, limit, fixed)
    found = dict(alternatives(source, block_parameters, limit, fixed, None))
    assert (proposal is None) == (not found)
    if proposal is not None:
        assert proposal.shape in found and max(found.values()) <= limit
        assert proposal.cost < SHARE * limit


@pytest.mark.parametrize("fraction", [0.75, 0.3])
@pytest.mark.parametrize("name", SOURCES)
def test_proposals_are_valid_and_use_the_budget(name: str, fraction: float) -> None:
    source = SOURCES[name]
    limit = fraction * parameters(source)
    proposal = propose(source, parameters, limit)
    assert proposal is not None and proposal == propose(source, parameters, limit)
    shape, step = proposal.shape, multiple(shape_of(source))
    validate(shape, shape_of(source))
    target = config_of(shape, source)
    assert target.to_hf().hidden_size == shape.hidden
    assert proposal.cost == target.num_parameters()
    assert (0.9 if name == "demo" else SHARE) * limit <= proposal.cost <= limit
    assert shape.hidden % step == 0 or shape.hidden == source.hidden_size
    assert shape.ffn % step == 0 or shape.ffn == source.intermediate_size


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1])
def test_proportions_are_kept(name: str, fraction: float) -> None:
    """Heads and channels shrink with the width, within 10%, KV heads roughly, depth least."""
    source = SOURCES[name]
    proposal = propose(source, block_parameters, fraction * block_parameters(source))
    assert proposal is not None
    shape = proposal.shape
    width = shape.hidden / source.hidden_size
    for size, full, tolerance in (
        (shape.heads, source.num_heads, 0.1),
        (shape.kv_heads, source.num_kv_heads, 0.4),
        (shape.ffn, source.intermediate_size, 0.1),
    ):
        assert abs(math.log(size / full / width)) < tolerance
    assert shape.layers / source.num_layers > width


@pytest.mark.parametrize(
    ("amount", "published"),
    [
        (1.35e9, Shape(24, 2048, 16, 16, 128, 5504)),
        (2.705e9, Shape(32, 2560, 20, 20, 128, 6912)),
        (0.37e9, Shape(24, 1024, 8, 8, 128, 2816)),
    ],
)
def test_proposals_from_llama_2_7b_are_near_the_published_shapes(
    amount: float, published: Shape
) -> None:
    proposal = propose(LLAMA2_7B, parameters, amount)
    assert proposal is not None
    assert abs(proposal.shape.layers - published.layers) <= 4
    for size in ("hidden", "heads", "ffn"):
        assert getattr(proposal.shape, size) == pytest.approx(getattr(published, size), rel=0.1)


def test_block_parameters_are_a_budget_of_their_own() -> None:
    source = SOURCES["smollm2-135m"]
    proposal = propose(source, block_parameters, 46e6)
    assert proposal is not None
    assert 0.97 * 46e6 <= block_parameters(config_of(proposal.shape, source)) <= 46e6


def test_fixed_sizes_are_kept() -> None:
    source = SOURCES["smollm2-135m"]
    free = propose(source, parameters, 70e6)
    assert free is not None and (free.shape.layers, free.shape.heads) != (20, 4)
    proposal = propose(source, parameters, 70e6, {"layers": 20, "heads": 4, "hidden": 500})
    assert proposal is not None
    assert (proposal.shape.layers, proposal.shape.heads, proposal.shape.hidden) == (20, 4, 500)
    assert 0.97 * 70e6 <= proposal.cost <= 70e6


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"layers": 31}, r"layers=31 is outside 1\.\.30.*layers=30"),
        ({"kv-heads": 0}, r"kv-heads=0 is outside 1\.\.3.*kv-heads=1"),
        ({"heads": 7}, r"no valid shape of this source .* has heads=7: fix fewer"),
        ({"hidden": 500, "heads": 6}, r"no valid shape .* has hidden=500,heads=6"),
    ],
)
def test_impossible_fixed_sizes_are_refused(fixed: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        propose(SOURCES["smollm2-135m"], parameters, 70e6, fixed)


def test_coarse_steps_give_one_of_the_largest_shapes() -> None:
    """Where nothing lies within 97% of the limit, the reach is that of the largest that fits."""
    source = SOURCES["demo"]
    costs = {
        shape: parameters(config_of(shape, source))
        for shape in every_shape(source)
        if parameters(config_of(shape, source)) < parameters(source)
    }
    ordered = sorted(costs.values())
    below, above = max(pairwise(ordered), key=lambda pair: pair[1] / pair[0])
    limit = above - 1
    assert below < SHARE * limit
    proposal = propose(source, parameters, limit)
    assert proposal is not None and SHARE * below <= proposal.cost <= below


def every_shape(source: ModelConfig) -> list[Shape]:
    found = []
    for layers in (1, 2, 3):
        for hidden in (8, 16, 24, 32):
            for heads, kv_heads in ((4, 2), (2, 2), (2, 1), (1, 1)):
                for ffn in range(8, 49, 8):
                    if hidden % heads == 0:
                        found.append(Shape(layers, hidden, heads, kv_heads, 8, ffn))
    return found


def test_the_rule_is_what_the_documentation_says() -> None:
    """Against a plain search over all shapes of a small source."""
    source = SOURCES["demo"]
    limit = 0.5 * parameters(source)
    full = shape_of(source)

    def distance(shape: Shape) -> float:
        def shrink(size: str) -> float:
            return math.log(getattr(full, size) / getattr(shape, size))

        width = shrink("hidden")
        weights = {"ffn": 20, "heads": 10, "kv_heads": 2}
        others = sum(w * (shrink(size) - width) ** 2 for size, w in weights.items())
        return 1.6 * shrink("layers") ** 2 + width**2 + others

    within = [
        shape
        for shape in every_shape(source)
        if 0.97 * limit <= parameters(config_of(shape, source)) <= limit
    ]
    proposal = propose(source, parameters, limit)
    assert within and proposal is not None
    assert proposal.shape == min(within, key=distance)


def test_nothing_fits_a_budget_below_the_smallest_shape() -> None:
    source = SOURCES["smollm2-135m"]
    shape, cost = smallest(source, parameters)
    assert shape == Shape(1, 32, 1, 1, 64, 32)
    assert cost == parameters(config_of(shape, source))
    assert propose(source, parameters, cost - 1) is None
    proposal = propose(source, parameters, cost)
    assert proposal is not None and proposal.shape == shape


def test_a_cost_that_ignores_width_takes_layers_only() -> None:
    """As on a device whose time goes to starting kernels."""
    proposal = propose(LLAMA2_7B, lambda config: 1.0 + config.num_layers, (1 + 32) / 2)
    assert proposal is not None
    assert proposal.shape == replace(shape_of(LLAMA2_7B), layers=15)


@pytest.mark.parametrize(
    ("hidden", "step"), [(4096, 128), (2048, 128), (1024, 64), (576, 32), (256, 16), (32, 8)]
)
def test_steps_follow_the_width_of_the_source(hidden: int, step: int) -> None:
    assert multiple(replace(shape_of(LLAMA2_7B), hidden=hidden)) == step


def test_a_proposal_can_be_given_by_name() -> None:
    proposal = propose(LLAMA2_7B, parameters, 3e9)
    assert proposal is not None
    assert parse_target(proposal.shape.describe(), shape_of(LLAMA2_7B)) == proposal.shape


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_sizes_can_be_aligned(name: str) -> None:
    source = SOURCES[name]
    limit = 0.5 * parameters(source)
    proposal = propose(source, parameters, limit, align=256)
    assert proposal is not None and proposal.cost <= limit
    assert proposal.shape.hidden % 256 == proposal.shape.ffn % 256 == 0
    with pytest.raises(InputError, match=r"--align 8192: the source's .* use --align \d+ or less"):
        propose(source, parameters, limit, align=8192)


def test_alternatives_are_shapes_of_equal_cost() -> None:
    source = SOURCES["smollm2-135m"]
    limit = 0.5 * parameters(source)
    found = dict(alternatives(source, parameters, limit, {}, None))
    best = propose(source, parameters, limit)
    assert best is not None and best.shape in found
    assert len({shape.layers for shape in found}) > 10 and len({s.hidden for s in found}) > 4
    whole = [shape for shape in found if (shape.hidden, shape.heads, shape.kv_heads) == (576, 9, 3)]
    assert len({shape.layers for shape in whole}) > 5
    # The deeper, the fewer channels.
    channels = [shape.ffn for shape in sorted(whole, key=lambda shape: shape.layers)]
    assert channels == sorted(channels, reverse=True)
    for shape, cost in found.items():
        assert SHARE * limit <= cost <= limit
        assert cost == parameters(config_of(shape, source))
    fixed = alternatives(source, parameters, limit, {"layers": 20, "hidden": 448}, 64)
    assert fixed and {(s.layers, s.hidden, s.ffn % 64) for s, _ in fixed} == {(20, 448, 0)}
