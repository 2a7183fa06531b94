"""Search over the set of blocks or layers that go, because what each is worth depends on the
others: sets whose members are exchanged (pruner.evolution) are compared by the divergence of the
model without them from the source.
"""

import random
from collections.abc import Sequence

Removed = tuple[int, ...]
"""Numbers of blocks or layers, ascending."""


def exchanged(parent: Removed, draw: random.Random, order: Sequence[int]) -> Removed:
    """`parent` with one or two of its members exchanged for others of `order`, which holds those
    that may go, the least score first; itself where there are no others. One is the likelier number
    (the lesser of two draws); the n-th least score is drawn to go, and the n-th largest to come
    back, with a weight of 1 / n, because scores tell something of what each is worth."""
    others = [index for index in order if index not in parent]
    own = [index for index in reversed(order) if index in parent]
    most = min(2, len(own), len(others))
    if not most:
        return parent
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
