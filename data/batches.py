"""Global batches split over ranks."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.log import logger
from data.reader import Samples, TokenReader
from data.sampler import DomainSampler


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's rows of a global batch."""

    ids: np.ndarray
    """Token ids: int64 [n, seq_len]."""
    domains: np.ndarray
    """Index of each row's domain in `BatchStream.domains`: int64 [n]."""
    step: int
    """Number of the global batch, from 0."""
    valid: np.ndarray | None = None
    """Which tokens count: bool [n, seq_len]; None means all."""
    documents: np.ndarray | None = None
    """Number of each token's document in its row: int32 [n, seq_len]; None: one each."""


class BatchStream:
    """This rank's share of an endless, resumable sequence of global batches.

    Rank r of W gets rows [r*G/W, (r+1)*G/W) of each global batch of G rows; for one history of
    domain weights the global batches themselves do not depend on W. When a domain is used up its
    next epoch, in a new order, starts and is announced once (on rank 0).

    Args:
        reader: the samples; the sampler must have been built from `reader.sizes`.
        sampler: the order; the stream advances it.
        global_batch: rows per step over all ranks, G.
        rank: this rank, r.
        world: number of ranks, W; must divide G.
    """

    def __init__(
        self,
        reader: TokenReader,
        sampler: DomainSampler,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert sampler.domains == reader.domains and 0 <= rank < world
        assert global_batch >= 1 and global_batch % world == 0, (global_batch, world)
        self.reader = reader
        self.sampler = sampler
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        self.domains = list(sampler.domains)
        self._announced = self.epochs

    @property
    def epochs(self) -> dict[str, int]:
        """Epoch, from 0, of the last sample drawn from each domain."""
        sizes = zip(self.sampler.used.items(), self.sampler.sizes, strict=True)
        return {domain: max(0, used - 1) // size for (domain, used), size in sizes}

    def next(self) -> Batch:
        """The rows of the next global batch that belong to this rank.

        Raises:
            InputError: a shard is damaged.
        """
        step = self.sampler.step
        plan = self.sampler.next_batch(self.global_batch)
        share = self.global_batch // self.world
        rows = plan[self.rank * share : (self.rank + 1) * share]
        read = self.read(rows)
        self._announce_epochs()
        return Batch(
            ids=read.ids,
            domains=rows[:, 0].copy(),
            step=step,
            valid=read.valid,
            documents=read.documents,
        )

    def read(self, rows: np.ndarray) -> Samples:
        """The samples `rows` [n, 3] as the sampler draws them. Raises InputError where a shard is
        damaged."""
        shape = len(rows), self.reader.seq_len
        found = Samples(np.empty(shape, np.int64))
        if self.reader.documents == "apart":
            chat = self.reader.manifest.chat
            valid = None if chat is None else np.empty(shape, np.bool_)
            found = Samples(found.ids, np.empty(shape, np.int32), valid)
        for domain in np.unique(rows[:, 0]):
            chosen = np.flatnonzero(rows[:, 0] == domain)
            read = self.reader.samples(self.domains[domain], rows[chosen, 2])
            for whole, part in (
                (found.ids, read.ids),
                (found.documents, read.documents),
                (found.valid, read.valid),
            ):
                if whole is not None:
                    whole[chosen] = part
        return found

    def ahead(self, count: int) -> np.ndarray:
        """Token ids, int64 [n, seq_len], of the next `count` samples over all ranks, one that comes
        again left out; they stay to be drawn. Raises InputError where a shard is damaged."""
        rows = copy.deepcopy(self.sampler).next_batch(count)
        _, first = np.unique(rows[:, [0, 2]], axis=0, return_index=True)
        return self.read(rows[np.sort(first)]).ids

    def order(self) -> dict[str, Any]:
        """What tells the order of samples, and how many of each domain were drawn: JSON-able."""
        sampler = self.sampler
        return {
            "data": sampler.fingerprint,
            "seed": sampler.seed,
            "sizes": dict(zip(sampler.domains, sampler.sizes, strict=True)),
            "used": sampler.used,
        }

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Changes the domain weights from the next batch on."""
        self.sampler.set_weights(weights)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state, the same on every rank and for every number of ranks."""
        return {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`. Raises InputError if it belongs to other data."""
        self.sampler.load_state_dict(state["sampler"])
        self._announced = self.epochs

    def _announce_epochs(self) -> None:
        epochs = self.epochs
        for domain, epoch in epochs.items():
            if epoch > self._announced[domain] and self.rank == 0:
                size = self.reader.sizes[domain]
                logger.warning(
                    f"domain {domain} starts epoch {epoch + 1} ({size:,} samples per epoch)"
                )
        self._announced = epochs
