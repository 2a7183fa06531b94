"""Orders, protected blocks and counts against what was published of Shortened LLaMA."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from data.errors import InputError
from pruner.shorten.parts import part_parameters
from pruner.shorten.ranking import (
    count_of,
    in_doubt,
    intervals,
    order_of,
    removable,
    replicated,
    take,
)
from trainer.models.config import ModelConfig

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
MODELS = {
    "7b": {},
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    },
}
PPL = {
    "llama-2-7b": "11,8,24,21,12,7,9,10,18,27,14,23,25,15,20,26,17,6,13,28,22,19,5,29,4,16,30,3,2,"
    "31,1,0",
    "vicuna-7b": "25,27,10,24,11,20,8,29,6,5,26,22,9,7,15,12,16,18,21,13,28,19,4,23,14,30,17,3,1,"
    "31,2,0",
}
TAYLOR = {
    "llama-2-7b": "0,28,27,25,29,26,24,23,21,22,30,20,19,18,17,14,16,13,12,15,31,11,10,1,9,8,7,6,5,"
    "2,4,3",
}
"""Unfiltered orders as published (shortened-llm, output_block_sensitivity)."""
PERPLEXITIES = [
    *(19178, 14743, 26.337, 24.887, 23.437, 22.488, 22.106, 21.564, 21.485, 21.583, 21.606),
    *(21.356, 21.543, 22.156, 21.714, 21.857, 23.543, 22.048, 21.607, 22.355, 21.956, 21.499),
    *(22.306, 21.750, 21.486, 21.756, 22.029, 21.681, 22.273, 22.985, 24.121, 45.737),
]
"""Of LLaMA-2-7B without block 0, 1, ... (the same)."""


def model(name: str) -> ModelConfig:
    return ModelConfig.from_hf(BASE | MODELS[name])


def published(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def count(name: str, **asked: Any) -> int:
    options: dict[str, Any] = {"remove": None, "ratio": None, "params": None, "first": 4, "last": 2}
    return count_of(model(name), model(name), **options | asked)


@pytest.mark.parametrize(
    ("name", "ratio", "params", "blocks", "left"),
    [
        ("7b", 0.20, "5.5b", 6, 5_524_115_456),
        ("7b", 0.27, "4.9b", 9, 4_916_965_376),
        ("7b", 0.35, "4.5b", 11, 4_512_198_656),
        ("7b", 0.45, "3.7b", 15, 3_702_665_216),
        ("7b", 0.60, "2.7b", 20, 2_690_748_416),
        ("7b", 0.80, "1.5b", 26, 1_476_448_256),
        ("13b", 0.21, "10.5b", 8, 10_478_228_480),
        ("13b", 0.29, "9.5b", 11, 9_526_615_040),
        ("13b", 0.37, "8.3b", 15, 8_257_797_120),
    ],
)
def test_published_sizes(name: str, ratio: float, params: str, blocks: int, left: int) -> None:
    source = model(name)
    assert source.num_parameters() - blocks * part_parameters(source, "block") == left
    assert count(name, ratio=ratio) == blocks
    assert count(name, params=params) == blocks
    assert count(name, params=str(left)) == blocks
    assert count(name, remove=blocks) == blocks


def test_blocks_beside_other_sizes() -> None:
    """Counted in the sizes that those have which stay."""
    source = model("7b")
    narrowed = replace(source, intermediate_size=source.intermediate_size // 2)
    options: dict[str, Any] = {"remove": None, "ratio": None, "params": None, "first": 4, "last": 2}
    taken = source.num_parameters() - narrowed.num_parameters()
    block = part_parameters(narrowed, "block")
    for blocks in (1, 10):
        left = narrowed.num_parameters() - blocks * block
        assert count_of(source, narrowed, **options | {"params": str(left)}) == blocks
        ratio = (taken + blocks * block) / source.num_parameters()
        assert count_of(source, narrowed, **options | {"ratio": ratio}) == blocks
    with pytest.raises(InputError, match=r"--then takes 32.1% of the parameters, one is 2.0%"):
        count_of(source, narrowed, **options | {"ratio": 0.3})
    with pytest.raises(InputError, match=r"in the sizes of --then"):
        count_of(source, narrowed, **options | {"params": str(source.num_parameters())})


def test_a_block_of_grouped_queries() -> None:
    llama = model("llama-3-8b")
    assert part_parameters(llama, "block") == 218_112_000
    # 4096 x (32 + 8 + 8 + 32) x 128, and 3 x 4096 x 14336, each with a norm.
    assert part_parameters(llama, "attention") == 41_943_040 + 4096
    assert part_parameters(llama, "feed-forward") == 176_160_768 + 4096


def test_orders_are_those_of_the_published_scores() -> None:
    order = order_of(PERPLEXITIES)
    # Three decimals leave a tie or two, which the model's own order decides.
    assert order[:7] == [11, 8, 24, 21, 12, 7, 9]
    assert set(order[-3:]) == {31, 1, 0} and order[-1] == 0
    assert order_of([1.0, math.inf, 0.5, 1.0]) == [2, 0, 3, 1]


def test_protected_blocks_are_passed_over() -> None:
    allowed = removable(32, 4, 2)
    assert allowed == list(range(4, 30))
    taylor = published(TAYLOR["llama-2-7b"])
    assert take(taylor, allowed, 6) == [24, 25, 26, 27, 28, 29]
    assert take(taylor, allowed, 9) == list(range(21, 30))
    assert take(taylor, allowed, 11) == list(range(19, 30))
    ppl = published(PPL["llama-2-7b"])
    assert take(ppl, allowed, 6) == [7, 8, 11, 12, 21, 24]
    vicuna = published(PPL["vicuna-7b"])
    assert take(vicuna, allowed, 15) == [*range(5, 12), 15, 20, 22, *range(24, 28), 29]
    for order in (taylor, ppl, vicuna):
        kept = set(range(32)) - set(take(order, allowed, 26))
        assert kept == {0, 1, 2, 3, 30, 31}
        # The filter never changes the first choices by perplexity.
    for order in (ppl, vicuna):
        assert take(order, allowed, 9) == take(order, range(32), 9)
    assert take(taylor, range(32), 1) == [0]
    assert removable(5, 4, 2) == [] and removable(6, 0, 0) == list(range(6))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"remove": 27},
            r"--remove 27: takes 27 of 32 .*--protect-last 2 leave 26 .*at most --remove 26",
        ),
        ({"ratio": 0.85}, r"--ratio 0.85: takes 28 of 32 blocks"),
        ({"ratio": 0.02}, r"--ratio 0.02: removes no block, because one is 3.0% .*--ratio 0.031"),
        ({"params": "6.7b"}, r"--params 6.7b: the source has 6,738,415,616 .* 6,536,032,256 witho"),
        ({"params": "9b"}, r"--params 9b: the source has 6,738,415,616"),
        ({"params": "some"}, r"--params 'some' is not a number of parameters"),
        (
            {"remove": 32, "first": 0, "last": 0},
            r"takes 32 of 32 blocks, and at least one must stay; ask for at most --remove 31$",
        ),
        (
            {"ratio": 0.99, "first": 0, "last": 0},
            r"takes 32 of 32 blocks, and at least one must stay; ask for at most --remove 31$",
        ),
        ({"remove": 1, "first": 31, "last": 1}, r"leave 0 to .*such as --protect-first 0"),
    ],
)
def test_what_cannot_be_removed_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        count("7b", **asked)


def test_intervals_are_those_of_a_mean() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(400, 2, generator=draw, dtype=torch.float64) * 2 + torch.tensor([5.0, 9.0])
    means = replicated(rows)
    for (low, high), column in zip(intervals(means), rows.t(), strict=True):
        # 95% of a normal mean lie within 1.96 standard errors.
        error = 1.96 * (column.std() / 20).item()
        assert low == pytest.approx(column.mean().item() - error, abs=0.25 * error)
        assert high == pytest.approx(column.mean().item() + error, abs=0.25 * error)
    means[:, 1] = torch.inf
    assert intervals(means)[1] == (math.inf, math.inf)


def test_blocks_are_unsure_where_replicates_disagree() -> None:
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(50, 4, generator=draw, dtype=torch.float64)
    # 1 and 2 are alike, 3 and 0 are not.
    means = replicated(noise + torch.tensor([9.0, 5.0, 5.0, 0.0]))
    assert in_doubt(means, range(4), 2) == [1, 2]
    assert in_doubt(means, range(4), 1) == [] and in_doubt(means, [0, 3], 1) == []
