"""Evolutionary search with successive halving.

The method of EvoPress (arXiv 2410.14649, section 3): one parent, mutated offspring, and a selection
by halving, in which more text is spent on ever fewer of them.
"""

import random
from collections.abc import Callable

from data.progress import Progress
from pruner.divergence import PARTS

STAGES = ((1, 4), (4, 2), (PARTS, 1))
"""Parts read of every candidate that is left, and how many candidates then remain."""
MOST_DRAWS = 20
"""Draws for each of the offspring before too few different ones are taken."""

Candidate = tuple[int, ...]
"""What is searched for."""


def evolve(
    divergence: Callable[[Candidate, int], float],
    parent: Candidate,
    mutated: Callable[[Candidate, random.Random], Candidate],
    *,
    generations: int,
    offspring: int,
    seed: int,
    keep: Callable[[], None],
) -> Candidate:
    """The best candidate after some generations from `parent` on, never worse than it on all of the
    text.

    Repeated, it takes the same way.

    Args:
        divergence: of a candidate, on so many parts of the text.
        parent: the candidate to begin with.
        mutated: a neighbour of a candidate; itself, where it has none.
        generations: at most.
        offspring: candidates in each.
        seed: of the draws.
        keep: called after every generation.
    """
    with Progress("search", total=generations, unit="generation") as bar:
        for number in range(generations):
            draw = random.Random(f"{seed} {number}")
            children: dict[Candidate, None] = {}
            for _ in range(offspring * MOST_DRAWS):
                if len(children) < offspring:
                    child = mutated(parent, draw)
                    children |= {child: None} if child != parent else {}
            if not children:
                return parent
            left = list(children)
            for parts, survivors in STAGES:
                left = sorted(left, key=lambda own: divergence(own, parts))[:survivors]
            (best,) = left
            if divergence(best, PARTS) < divergence(parent, PARTS):
                parent = best
            keep()
            bar.update(1)
    return parent
