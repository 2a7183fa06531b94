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


def exchanged(parent: Removed, allowed: Sequence[int], draw: random.Random) -> Removed:
    """`parent` with one or two of its blocks exchanged for others that are `allowed`; one is the
    likelier number (the lesser of two draws)."""
    others = [index for index in allowed if index not in parent]
    most = min(2, len(parent), len(others))
    number = min(draw.randint(1, most), draw.randint(1, most))
    gone = draw.sample(parent, number)
    return tuple(sorted({*parent, *draw.sample(others, number)} - set(gone)))


def evolve(
    divergence: Callable[[Removed, int], float],
    parent: Removed,
    allowed: Sequence[int],
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
        allowed: blocks that may go.
        generations: at most.
        offspring: sets in each.
        seed: of the draws.
        keep: called after every generation.
    """
    if len(parent) == len(allowed):
        return parent
    with Progress("search", total=generations, unit="generation") as bar:
        for number in range(generations):
            draw = random.Random(f"{seed} {number}")
            children: dict[Removed, None] = {}
            for _ in range(offspring * MOST_DRAWS):
                if len(children) < offspring:
                    child = exchanged(parent, allowed, draw)
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
