"""Search over the set of blocks that go, because what each is worth depends on the others.

The method of EvoPress (arXiv 2410.14649, section 3): one parent, offspring that exchange one or two
of its removed blocks for others, and a selection by halving, in which more text is spent on ever
fewer of them. Sets are compared by the divergence of the model without them from the source.
"""

import random
from collections.abc import Callable, Sequence

from data.progress import Progress
from pruner.divergence import PARTS

STAGES = ((1, 4), (4, 2), (PARTS, 1))
"""Parts read of every set that is left, and how many sets then remain."""
MOST_DRAWS = 20
"""Draws for each of the offspring before too few different ones are taken."""

Removed = tuple[int, ...]
"""Numbers of blocks, ascending."""


def exchanged(parent: Removed, order: Sequence[int], draw: random.Random) -> Removed:
    """`parent` with one or two of its blocks exchanged for others of `order`, which holds those
    that may go, the least score first. One is the likelier number (the lesser of two draws); the
    n-th least score is drawn to go, and the n-th largest to come back, with a weight of 1 / n,
    because scores tell something of a block's worth."""
    others = [index for index in order if index not in parent]
    own = [index for index in reversed(order) if index in parent]
    most = min(2, len(own), len(others))
    number = min(draw.randint(1, most), draw.randint(1, most))
    back, gone = _drawn(own, number, draw), _drawn(others, number, draw)
    return tuple(sorted({*parent, *gone} - back))


def _drawn(indices: Sequence[int], number: int, draw: random.Random) -> set[int]:
    """`number` of `indices`, the n-th with a weight of 1 / n."""
    weights = {index: 1 / (place + 1) for place, index in enumerate(indices)}
    found: set[int] = set()
    while len(found) < number:
        left = [index for index in indices if index not in found]
        found |= set(draw.choices(left, [weights[index] for index in left]))
    return found


def evolve(
    divergence: Callable[[Removed, int], float],
    parent: Removed,
    order: Sequence[int],
    *,
    generations: int,
    offspring: int,
    seed: int,
    keep: Callable[[], None],
) -> Removed:
    """The best set after some generations from `parent` on, never worse than it on all of the text.

    Repeated, it takes the same way.

    Args:
        divergence: of a set, on so many parts of the text.
        parent: the set to begin with.
        order: blocks that may go, the least score first.
        generations: at most.
        offspring: sets in each.
        seed: of the draws.
        keep: called after every generation.
    """
    if len(parent) == len(order):
        return parent
    with Progress("search", total=generations, unit="generation") as bar:
        for number in range(generations):
            draw = random.Random(f"{seed} {number}")
            children: dict[Removed, None] = {}
            for _ in range(offspring * MOST_DRAWS):
                if len(children) < offspring:
                    child = exchanged(parent, order, draw)
                    children |= {child: None} if child != parent else {}
            left = list(children)
            for parts, survivors in STAGES:
                left = sorted(left, key=lambda removed: divergence(removed, parts))[:survivors]
            (best,) = left
            if divergence(best, PARTS) < divergence(parent, PARTS):
                parent = best
            keep()
            bar.update(1)
    return parent
