"""From scores of blocks, or of their layers, to those that are removed: how many, in which order,
how sure.

Orders are those of shortened-llm (arXiv 2402.02834): ascending, the least score first, equal ones
in the order of the model. They are over all blocks; those that are protected (there, as here by
default, the first four and the last two) are passed over only when blocks are taken.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.errors import InputError
from pruner.budget import number_of_parameters
from pruner.importance import SURE
from pruner.shorten.parts import WORDS, Units, part_parameters, parts_of
from trainer.models.config import ModelConfig

SLACK = 0.03
"""Part of a block by which --ratio may be exceeded: published ratios are rounded to whole per
cents."""
REPLICATES = 1000
"""Bootstrap replicates behind intervals."""
QUANTILES = (0.025, 0.975)
"""Of the replicates: 95% intervals."""


def order_of(scores: Sequence[float]) -> list[int]:
    """Numbers of all blocks, the least score first. The sort is stable, and infinities are last."""
    return sorted(range(len(scores)), key=lambda index: scores[index])


def removable(layers: int, first: int, last: int, units: Units = "block") -> list[int]:
    """Numbers of the parts (parts_of) of blocks between the `first` and the `last` ones, which are
    protected."""
    blocks = range(first, max(first, layers - last))
    parts = parts_of(units, layers)
    return [number for number, part in enumerate(parts) if part.block in blocks]


def take(order: Sequence[int], allowed: Sequence[int], count: int) -> list[int]:
    """The first `count` of `order` that are `allowed`, ascending. There must be as many."""
    chosen = [index for index in order if index in set(allowed)][:count]
    assert len(chosen) == count, (order, allowed, count)
    return sorted(chosen)


def count_of(
    model: ModelConfig,
    narrowed: ModelConfig,
    *,
    remove: int | None,
    ratio: float | None,
    params: str | None,
    first: int,
    last: int,
    units: Units = "block",
) -> int:
    """How many `units` go: `remove`, or as many as `ratio` of the `model`'s parameters holds, or
    those whose removal comes nearest to `params` parameters. `narrowed` is the model with all
    blocks in the sizes that those have which stay.

    Raises InputError where that is none, or more than are not protected.
    """
    layers, block, words = model.num_layers, part_parameters(narrowed, units), WORDS[units]
    one = words.removesuffix("s")
    total, left = model.num_parameters(), narrowed.num_parameters()
    if remove is not None:
        count, asked = remove, f"--remove {remove}"
    elif ratio is not None:
        count, asked = (
            math.floor((ratio * total - (total - left)) / block + SLACK),
            f"--ratio {ratio:g}",
        )
    else:
        assert params is not None
        amount = number_of_parameters(params)
        if not amount:
            raise InputError(
                f"--params {params!r} is not a number of parameters: write for example 5.5b or "
                "70000000"
            )
        count, asked = round((left - amount) / block), f"--params {params}"
        if count < 1:
            sizes = "" if left == total else f"{left:,} in the sizes of --then, "
            raise InputError(
                f"{asked}: the source has {total:,} parameters, {sizes}and {left - block:,} "
                f"without one of its {words}; ask for at most that"
            )
    if count < 1:
        least = math.ceil(1000 * (total - left + block) / total) / 1000
        sizes = "" if left == total else f"--then takes {1 - left / total:.1%} of the parameters, "
        raise InputError(
            f"{asked}: removes no {one}, because {sizes}one is {block / total:.1%}"
            f"{'' if sizes else ' of the parameters'}; use at least --ratio {least:g}, or "
            "--remove 1"
        )
    _require_allowed(asked, count, units, layers, first, last)
    return count


def _require_allowed(
    asked: str, count: int, units: Units, layers: int, first: int, last: int
) -> None:
    """Raises InputError where `count` is more than are not protected, or than can go."""
    number = len(parts_of(units, layers))
    allowed = len(removable(layers, first, last, units))
    # Where no block is protected, fewer than there are layers of a kind, so that one is left.
    most = allowed if allowed < number else layers - 1
    if count > most:
        unprotected = layers - 1
        fix = f"ask for at most --remove {most}"
        if not most:
            fix = "protect fewer, such as --protect-first 0 --protect-last 0"
            if count > unprotected:
                fix += f", and ask for at most --remove {unprotected}"
        elif allowed < number and most < unprotected:
            fix += ", or protect fewer"
        why = f"--protect-first {first} and --protect-last {last} leave {allowed} to take from"
        if allowed == number:
            why = "at least one must stay"
            if number > layers:
                why = "at least one layer of each kind must stay"
        raise InputError(f"{asked}: takes {count} of {number} {WORDS[units]}, and {why}; {fix}")


def replicated(rows: Tensor) -> Tensor:
    """Means of `rows` [n, K] fp64 over bootstrap replicates of the n: [REPLICATES, K]. Replicates
    draw as many at random, with repetition, always the same ones."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(rows), (REPLICATES, len(rows)), generator=draw)
    counts = torch.zeros(REPLICATES, len(rows), dtype=torch.float64)
    counts.scatter_add_(1, chosen, torch.ones_like(counts))
    return counts @ rows / len(rows)


def intervals(means: Tensor) -> list[tuple[float, float]]:
    """95% of the replicates' `means` [R, K] lie between these, for each of K."""
    found = torch.quantile(means, torch.tensor(QUANTILES, dtype=means.dtype), dim=0)
    # Between two infinities there is no number.
    low, high = found.nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()
    return list(zip(low, high, strict=True))


def in_doubt(means: Tensor, allowed: Sequence[int], count: int) -> list[int]:
    """Numbers that are among the `count` lowest of the `allowed` in some replicates and not in
    others; `means` [R, K]."""
    taken = torch.zeros(means.shape[1], dtype=torch.float64)
    for replicate in means.tolist():
        taken[take(order_of(replicate), allowed, count)] += 1
    share = taken / len(means)
    unsure = (share > 1 - SURE) & (share < SURE)
    return torch.nonzero(unsure).flatten().tolist()
