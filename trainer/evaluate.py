"""Token-weighted held-out loss per domain, through the same forward pass as training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.errors import InputError
from data.progress import Progress
from data.reader import Samples, TokenReader, joined
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext, reshard

MOST_NATS = 700.0
"""Above it, perplexity is infinite."""


def perplexity(nats: float) -> float:
    """exp(nats), infinite where that is too large for a float."""
    return math.inf if nats > MOST_NATS else math.exp(nats)


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Mean loss in nats over `tokens` target tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


@torch.no_grad()
def evaluate(
    model: CausalLM,
    reader: TokenReader,
    domains: Sequence[str],
    max_sequences: int,
    batch: int,
    context: DistributedContext,
    masks: Masks | None = None,
    spread: bool = False,
    description: str = "evaluate",
) -> dict[str, DomainLoss]:
    """Loss of each domain on its first `max_sequences` sequences, or on as many spread evenly.

    Documents are kept apart, and tokens left out, as `reader` says. A forward pass takes `batch`
    sequences per rank, the last what is left. Every target token weighs the same, and the sequences
    do not depend on the number of ranks. All ranks take part, each with equally many forward
    passes, and all get the result. `description` names the work in the progress. Raises InputError
    for a domain that `reader` lacks.
    """
    unknown = [domain for domain in domains if domain not in reader.sizes]
    if unknown:
        raise InputError(f"no sequences of domain {unknown[0]!r}; this split has {reader.domains}")
    rows = []
    for index, domain in enumerate(domains):
        first = range(min(max_sequences, reader.sizes[domain]))
        samples = reader.spread(domain, max_sequences).tolist() if spread else first
        rows += [(index, sample) for sample in samples]
    sums = torch.zeros(2, len(domains), dtype=torch.float64, device=context.device)
    training = model.training
    model.eval()
    with Progress(description, total=len(rows), unit="sequence", transient=True) as bar:
        for start in range(0, len(rows), context.world * batch):
            passed = rows[start : start + context.world * batch]
            mine = passed[context.rank * batch :][:batch]
            # Every rank makes the same number of passes, because gathering weights is collective:
            # one without work left runs a sequence that does not count.
            read, owners = context.raise_on_any_rank(
                partial(_read, reader, domains, mine or rows[:1])
            )
            ids = torch.from_numpy(read.ids).to(context.device)
            found = read.documents
            documents = None if found is None else torch.from_numpy(found).to(context.device)
            owners = owners.to(context.device)
            targets, valid = next_token_targets(ids, read.valid, documents)
            valid[len(mine) :] = False
            weights = valid.float()
            output = model(ids, masks=masks, targets=targets, weights=weights, documents=documents)
            # Not a matrix product: a NaN times the zeros of other domains would be theirs too.
            losses = output.token_loss.double().sum(dim=1, keepdim=True)
            sums[0] += torch.where(owners > 0, losses, 0.0).sum(dim=0)
            sums[1] += valid.double().sum(dim=1) @ owners
            bar.update(len(passed))
    model.train(training)
    reshard(model)
    totals = context.all_reduce_sum(sums).cpu().tolist()
    return {
        # Sequences of conversations may have no target.
        domain: DomainLoss(totals[0][i] / max(1, totals[1][i]), int(totals[1][i]))
        for i, domain in enumerate(domains)
    }


def overall(losses: dict[str, DomainLoss]) -> DomainLoss:
    """Token-weighted mean over domains."""
    tokens = sum(domain.tokens for domain in losses.values())
    return DomainLoss(sum(d.loss * d.tokens for d in losses.values()) / max(1, tokens), tokens)


def report(losses: dict[str, DomainLoss]) -> dict[str, dict[str, Any]]:
    """JSON-able form: {domain: {loss, perplexity, tokens}}; JSON knows no infinity, so that an
    infinite perplexity is None."""
    return {
        domain: {
            "loss": d.loss,
            "perplexity": None if d.perplexity == math.inf else d.perplexity,
            "tokens": d.tokens,
        }
        for domain, d in losses.items()
    }


def _read(
    reader: TokenReader, domains: Sequence[str], rows: list[tuple[int, int]]
) -> tuple[Samples, torch.Tensor]:
    """The samples `rows`, and their domains as one-hot rows: float64 [n, D]."""
    read = [reader.samples(domains[index], np.array([sample])) for index, sample in rows]
    owners = F.one_hot(torch.tensor([index for index, _ in rows]), len(domains))
    return joined(read), owners.double()
