"""The order of training samples: a pure function of (data, seed, history of domain weights).

All arithmetic is on integers, so for one history of weights the order is the same on every
platform, for every number of ranks, and after a resume at any step. Weights that follow losses
differ by rounding between such runs, seldom so far that the order changes (data/mixture.py), and
never when they are replayed (data/weight_history.py). The state is a handful of numbers per domain.
"""

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction
from math import floor, isfinite
from typing import Any

import numpy as np

from data.errors import InputError

STATE_VERSION = 1
ROUNDS = 6
# Weights are fixed-point fractions that sum to exactly ONE.
FRACTION_BITS = 32
ONE = 1 << FRACTION_BITS


class Permutation:
    """Keyed pseudo-random bijection of range(n), computed point by point without a table.

    A balanced Feistel network (Luby and Rackoff 1988) over the next even number of bits, with
    splitmix64's finaliser (Steele et al. 2014) as its round function. Values outside the range are
    sent through again ("cycle walking", Black and Rogaway 2002): below four passes on average,
    since the network's domain is below 4n.

    Args:
        n: size of the range, at least 1.
        key: JSON-able parts that select the permutation.
    """

    def __init__(self, n: int, key: tuple[Any, ...]) -> None:
        assert n >= 1
        self.n = n
        half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        text = json.dumps(key, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        digest = hashlib.blake2b(text, digest_size=8 * ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Images of `indices` (each in range(n)): int64 of the same shape."""
        values = np.asarray(indices).astype(np.uint64)
        assert not values.size or int(values.max()) < self.n
        values = self._network(values)
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values.flat[outside] = walked = self._network(values.flat[outside])
            outside = outside[walked >= self.n]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


class DomainSampler:
    """Draws global batches from weighted domains; every sample of a domain once per epoch.

    Each step a domain's due share is its weight times the batch size plus what earlier steps owe
    it; shares are rounded by largest remainder and the rest is carried on. Where every domain's
    weight is worth at least one sample per step, the realised counts hence stay within one sample
    of the ideal; a smaller domain whose weight jumps up and down may wait a little longer for its
    due, since counts cannot be negative.
    There is no cumulative ratio that a change of weights could over-correct.

    Args:
        sizes: samples per domain.
        weights: relative weight per domain, finite, at least 0, not all 0.
        seed: selects the order.
        fingerprint: identity of the data; a state of other data is refused.

    Raises:
        InputError: bad weights, or names that differ from those of `sizes`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        seed: int,
        fingerprint: str,
    ) -> None:
        assert sizes and all(size >= 1 for size in sizes.values())
        self.domains = list(sizes)
        self.sizes = [int(sizes[domain]) for domain in self.domains]
        self.seed = int(seed)
        self.fingerprint = fingerprint
        self.step = 0
        self._used = [0] * len(self.domains)
        self._carry = [0] * len(self.domains)
        self._weights = self._quantised(weights)
        self._permutations: dict[int, tuple[int, Permutation]] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Weights in force, normalised."""
        return {
            domain: weight / ONE for domain, weight in zip(self.domains, self._weights, strict=True)
        }

    @property
    def used(self) -> dict[str, int]:
        """Samples drawn from each domain so far, over all epochs."""
        return dict(zip(self.domains, self._used, strict=True))

    def start_after(self, used: Mapping[str, int]) -> None:
        """Begins behind the first `used` samples of each domain, which another run has drawn."""
        assert not self.step and used.keys() <= set(self.domains)
        self._used = [int(used.get(domain, 0)) for domain in self.domains]

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the weights from the next batch on. Raises InputError as the constructor does."""
        self._weights = self._quantised(weights)

    def next_batch(self, global_batch: int) -> np.ndarray:
        """The next `global_batch` samples: int64 [global_batch, 3] of (domain, epoch, sample).

        Domains are indices into `self.domains`. Rows are shuffled, so that each rank's slice holds
        a mixture.
        """
        assert global_batch >= 1
        counts, self._carry = _apportion(self._carry, self._weights, global_batch)
        rows = np.empty((global_batch, 3), np.int64)
        filled = 0
        for domain, count in enumerate(counts):
            while count:
                epoch, position = divmod(self._used[domain], self.sizes[domain])
                part = min(count, self.sizes[domain] - position)
                rows[filled : filled + part, 0] = domain
                rows[filled : filled + part, 1] = epoch
                order = self._permutation(domain, epoch)
                rows[filled : filled + part, 2] = order(np.arange(position, position + part))
                self._used[domain] += part
                filled += part
                count -= part
        places = Permutation(global_batch, (self.seed, "batch", self.step))
        self.step += 1
        return rows[places(np.arange(global_batch))]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state: integers and names only."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "domains": list(self.domains),
            "sizes": list(self.sizes),
            "step": self.step,
            "used": list(self._used),
            "carry": list(self._carry),
            "weights": list(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`.

        Raises:
            InputError: the state belongs to other data, another seed or another sample length.
        """
        mine = self.state_dict()
        for key in ("version", "fingerprint", "domains", "sizes", "seed"):
            if state[key] != mine[key]:
                raise InputError(
                    f"cannot resume: the checkpoint's sample order has {key} {state[key]!r}, this "
                    f"run {mine[key]!r}; use the data, seed and sequence length of the checkpoint, "
                    "or start a new output"
                )
        self.step = state["step"]
        self._used = list(state["used"])
        self._carry = list(state["carry"])
        self._weights = list(state["weights"])

    def _permutation(self, domain: int, epoch: int) -> Permutation:
        cached = self._permutations.get(domain)
        if cached is None or cached[0] != epoch:
            key = (self.seed, self.domains[domain], epoch)
            cached = (epoch, Permutation(self.sizes[domain], key))
            self._permutations[domain] = cached
        return cached[1]

    def _quantised(self, weights: Mapping[str, float]) -> list[int]:
        if weights.keys() != set(self.domains):
            missing = [domain for domain in self.domains if domain not in weights]
            unknown = [domain for domain in weights if domain not in self.domains]
            raise InputError(
                f"domain weights do not match the data: missing {missing or 'none'}, unknown "
                f"{unknown or 'none'}; the data has {', '.join(self.domains)}"
            )
        values = [float(weights[domain]) for domain in self.domains]
        if not all(isfinite(value) and value >= 0 for value in values) or not any(values):
            raise InputError(
                f"domain weights must be finite, at least 0 and not all 0, got {dict(weights)}"
            )
        return _quantise(values)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _quantise(values: list[float]) -> list[int]:
    """Fixed-point fractions of the values' sum, rounded by largest remainder to sum to ONE."""
    exact = [Fraction(value) for value in values]
    total = sum(exact)
    shares = [value / total * ONE for value in exact]
    counts = [floor(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: ONE - sum(counts)]:
        counts[i] += 1
    return counts


def _apportion(carry: list[int], weights: list[int], total: int) -> tuple[list[int], list[int]]:
    """Splits `total` samples by weight. Returns counts and the carry to the next step.

    Carries are in units of 1/ONE sample and sum to 0.
    """
    due = [owed + weight * total for owed, weight in zip(carry, weights, strict=True)]
    counts = [max(0, share >> FRACTION_BITS) for share in due]
    rest = [share - (count << FRACTION_BITS) for share, count in zip(due, counts, strict=True)]
    missing = total - sum(counts)
    for i in sorted(range(len(rest)), key=lambda i: (-rest[i], i))[: max(0, missing)]:
        counts[i] += 1
        rest[i] -= ONE
    # More than `total` only where domains that are owed less than nothing were rounded up to 0.
    for _ in range(max(0, -missing)):
        i = min((i for i in range(len(rest)) if counts[i]), key=lambda i: (rest[i], i))
        counts[i] -= 1
        rest[i] += ONE
    assert sum(counts) == total and sum(rest) == 0
    return counts, rest
