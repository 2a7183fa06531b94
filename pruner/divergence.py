"""How far a pruned model's predictions are from its source's, on the first parts of a text.

Pruned models are masks on the loaded source, so none is built. What is computed is kept in a file,
and a search that is run again goes on from it.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pruner.kept_values import keep_values, read_values
from trainer.kernels.linear_cross_entropy import TeacherOutput
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext, full_tensor, reshard

PARTS = 16
"""Parts of the text, which are read one after another."""


class Divergence:
    """Mean Kullback-Leibler divergence, in nats per token, of masked models from the model without
    masks. Collective, the same on every rank.

    Args:
        model: the source.
        sequences: [n, S], the text; n is at least 1.
        batch: sequences per rank in a pass.
        path: the file of what is known.
    """

    def __init__(
        self,
        model: CausalLM,
        sequences: Tensor,
        context: DistributedContext,
        batch: int,
        path: Path,
    ) -> None:
        self.model = model
        self.context = context
        self.batch = batch
        self.path = path
        size = -(-len(sequences) // PARTS)
        self.parts = list(sequences.split(size))
        self.known: dict[str, list[float]] = read_values(path, {"*": [float]}, context)
        """Means over each part, by the name of the masks."""
        self._states: dict[tuple[int, int], Tensor] = {}
        """Outputs of the source's final norm, by part and start within it, on the CPU."""
        reshard(model)
        self._head = full_tensor(model.head_weight.detach())

    def of(self, name: str, masks: Callable[[], Masks], parts: int = PARTS) -> float:
        """The mean over the first `parts` of the text, as far as there are so many, with the masks
        that `name` stands for; infinite where it is no number."""
        found = self.known.setdefault(name, [])
        wanted = min(parts, len(self.parts))
        if len(found) < wanted:
            made = masks()
            for number in range(len(found), wanted):
                found.append(self._measure(made, number))
        sizes = [len(part) for part in self.parts[:wanted]]
        pairs = zip(found[:wanted], sizes, strict=True)
        return sum(value * size for value, size in pairs) / sum(sizes)

    @property
    def computed(self) -> int:
        """Sequences on which masked models were computed, over all ranks."""
        sizes = [len(part) for part in self.parts]
        return sum(sum(sizes[: len(found)]) for found in self.known.values())

    def keep(self) -> None:
        """Writes what is known. Raises InputError on every rank where that fails."""
        finite = {n: found for n, found in self.known.items() if max(found, default=0) < math.inf}
        keep_values(self.path, finite, self.context)

    @torch.no_grad()
    def _measure(self, masks: Masks, number: int) -> float:
        ids = self.parts[number]
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
