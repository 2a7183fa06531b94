"""Search over the set of blocks that go, because what each is worth depends on the others.

The method of EvoPress (arXiv 2410.14649, section 3): one parent, offspring that exchange one or two
of its removed blocks for others, and a selection by halving, in which more text is spent on ever
fewer of them. Sets are compared by the divergence of the model without them from the source.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.errors import InputError
from data.files import write_text
from data.progress import Progress
from data.records import fits, read_json
from pruner.shorten.deletion import without
from pruner.shorten.kept import FOLDER
from trainer.kernels.linear_cross_entropy import TeacherOutput
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext, full_tensor, reshard

CHUNKS = 16
"""Parts of the text, which are read one after another."""
STAGES = ((1, 4), (4, 2), (CHUNKS, 1))
"""Parts read of every set that is left, and how many sets then remain."""
MOST_DRAWS = 20
"""Draws for each of the offspring before too few different ones are taken."""

Removed = tuple[int, ...]
"""Numbers of blocks, ascending."""


class Divergence:
    """Mean divergence in nats of the model without some blocks from the model itself, on the first
    parts of a text; what is computed is kept in a file. Collective, the same on every rank.

    Args:
        model: the source.
        sequences: [n, S], the text; n is at least 1.
        batch: sequences per rank in a pass.
        output: the output folder.
        key: tells apart what is kept there.
    """

    def __init__(
        self,
        model: CausalLM,
        sequences: Tensor,
        context: DistributedContext,
        batch: int,
        output: Path,
        key: str,
    ) -> None:
        self.model = model
        self.context = context
        self.batch = batch
        self.path = output / FOLDER / f"{key}.json"
        size = -(-len(sequences) // CHUNKS)
        self.parts = list(sequences.split(size))
        self.known: dict[str, list[float]] = context.broadcast(
            self._read() if context.is_main else {}
        )
        self._states: dict[tuple[int, int], Tensor] = {}
        """Outputs of the source's final norm, by part and start within it, on the CPU."""
        reshard(model)
        self._head = full_tensor(model.head_weight.detach())

    def of(self, removed: Removed, parts: int) -> float:
        """The mean over the first `parts` of the text, as far as there are so many."""
        found = self.known.setdefault(",".join(map(str, removed)), [])
        wanted = min(parts, len(self.parts))
        for number in range(len(found), wanted):
            found.append(self._measure(removed, number))
        sizes = [len(part) for part in self.parts[:wanted]]
        pairs = zip(found[:wanted], sizes, strict=True)
        return sum(value * size for value, size in pairs) / sum(sizes)

    @property
    def computed(self) -> int:
        """Sequences on which models without blocks were computed, over all ranks."""
        sizes = [len(part) for part in self.parts]
        return sum(sum(sizes[: len(found)]) for found in self.known.values())

    def keep(self) -> None:
        """Writes what is known. Raises InputError on every rank where that fails."""

        def write() -> None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self.known))
            except OSError as error:
                raise InputError(
                    f"--output {self.path.parent.parent} cannot be written ({error}); free space"
                ) from error

        self.context.raise_on_any_rank(write if self.context.is_main else lambda: None)

    def _read(self) -> dict[str, list[float]]:
        try:
            found = read_json(self.path, "")
        except InputError:
            return {}
        return found if fits(found, {"*": [float]}) else {}

    @torch.no_grad()
    def _measure(self, removed: Removed, number: int) -> float:
        """The mean over a part of the text; infinite where it is no number."""
        ids = self.parts[number]
        masks = without(removed, self.model, self.context.device)
        total = torch.zeros(1, dtype=torch.float64, device=self.context.device)
        step = self.batch * self.context.world
        for start in range(0, len(ids), step):
            first = start + self.context.rank * self.batch
            mine = ids[first : min(first + self.batch, start + step)]
            # Ranks without work left run a sequence that does not count: gathers are collective.
            counts = bool(len(mine))
            mine = (mine if counts else ids[:1]).to(self.context.device)
            divergence = self._pass(mine, masks, (number, first))
            if counts:
                total += divergence
        mean = float(self.context.all_reduce_sum(total).item()) / (len(ids) * (ids.shape[1] - 1))
        return mean if math.isfinite(mean) else math.inf

    def _pass(self, ids: Tensor, masks: Masks, place: tuple[int, int]) -> Tensor:
        """Summed divergence of a few sequences, fp64."""
        if place not in self._states:
            self._states[place] = self._intact(ids)
        states = self._states[place].to(ids.device)
        self._head = self._head.to(states.dtype)
        targets, valid = next_token_targets(ids)
        teacher = TeacherOutput(states, self._head, 1.0)
        output = self.model(ids, masks, targets, valid.float(), teacher)
        assert isinstance(output, LossOutput) and output.token_kl is not None
        return output.token_kl.double().sum()

    def _intact(self, ids: Tensor) -> Tensor:
        """Outputs [B, S, d] of the whole model's final norm."""
        found: list[Tensor] = []
        norm = self.model.get_submodule(self.model.names.final_norm)
        handle = norm.register_forward_hook(lambda _, inputs, output: found.append(output.cpu()))
        try:
            self.model(ids, targets=ids, weights=torch.zeros(ids.shape, device=ids.device))
        finally:
            handle.remove()
        return found[0]


def exchanged(parent: Removed, allowed: Sequence[int], draw: random.Random) -> Removed:
    """`parent` with one or two of its blocks exchanged for others that are `allowed`; one is the
    likelier number (the lesser of two draws)."""
    others = [index for index in allowed if index not in parent]
    most = min(2, len(parent), len(others))
    number = min(draw.randint(1, most), draw.randint(1, most))
    gone = draw.sample(parent, number)
    return tuple(sorted({*parent, *draw.sample(others, number)} - set(gone)))


def evolve(
    divergence: Divergence,
    parent: Removed,
    allowed: Sequence[int],
    *,
    generations: int,
    offspring: int,
    seed: int,
) -> Removed:
    """The best set after some generations from `parent` on, never worse than it on all of the text.

    Repeated, it takes the same way, on which all is known already. Every generation is kept.
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
                left = sorted(left, key=lambda removed: divergence.of(removed, parts))[:survivors]
            (best,) = left
            if divergence.of(best, CHUNKS) < divergence.of(parent, CHUNKS):
                parent = best
            divergence.keep()
            bar.update(1)
    return parent
