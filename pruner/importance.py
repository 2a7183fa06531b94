"""Initial scores: one calibration pass that measures how strongly each unit is used.

Activations are measured as in Minitron (arXiv 2407.14679, section 2.2): the mean of |x| over the
tokens of a sequence, then the sum of squares over sequences. Blocks are measured by how much they
turn the residual stream: one minus the cosine of input and output (ShortGPT, arXiv 2403.03853).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruner.config import MaskConfig
from pruner.masks import Family
from pruner.shapes import shape_of
from trainer.models.llama import CausalLM, DecoderLayer
from trainer.parallel import DistributedContext

PAPER_FLAT_MEAN = 5.0
PAPER_IMPORTANCE_MEAN = 2.0
"""log-alpha of an average unit that starts from importance: P(z = 1) is 0.6, and no unit is held at
its bound."""
FLAT_STD = 0.01


class ActivationStatistics:
    """Forward hooks that accumulate the importance of every unit; use as a context manager.

    `weights` [B] says how much each sequence of the next forward pass counts (0 for padding).
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.shape = shape_of(model.config)
        self.weights = torch.ones(0)
        self.device = next(model.parameters()).device
        shape = self.shape
        self.hidden = self._zeros(1, shape.hidden)
        self.layer = self._zeros(1, shape.layers)
        self.heads = self._zeros(shape.layers, shape.heads)
        self.intermediate = self._zeros(shape.layers, shape.ffn)
        self._handles: list[Any] = []

    def __enter__(self) -> "ActivationStatistics":
        for index, block in enumerate(self.model.model.layers):
            assert isinstance(block, DecoderLayer)
            self._watch(block.self_attn.q_proj, self._add_hidden)
            self._watch(block.mlp.gate_proj, self._add_hidden)
            self._watch(block.self_attn.o_proj, self._add_heads, index)
            self._watch(block.mlp.down_proj, self._add_channels, index)
            self._handles.append(block.register_forward_hook(self._block_hook(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reduce(self, context: DistributedContext) -> dict[str, Tensor]:
        """Importance of each family's units [rows, units], fp64 on the CPU, summed over ranks."""
        sums = [self.hidden, self.layer, self.heads, self.intermediate]
        hidden, layer, heads, intermediate = (context.all_reduce_sum(s).cpu() for s in sums)
        grouped = heads.view(-1, self.shape.group)
        return {
            "hidden": hidden,
            "layer": layer,
            "kv_group": grouped.sum(-1).view(self.shape.layers, self.shape.kv_heads),
            "query_head": grouped,
            "intermediate": intermediate,
        }

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def _watch(self, module: nn.Module, add: Callable[..., None], *arguments: int) -> None:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            per_sequence = inputs[0].detach().float().abs().mean(1).double().square()
            add((per_sequence * self.weights[:, None]).sum(0), *arguments)

        self._handles.append(module.register_forward_pre_hook(hook))

    def _add_hidden(self, squares: Tensor) -> None:
        self.hidden[0] += squares

    def _add_heads(self, squares: Tensor, index: int) -> None:
        self.heads[index] += squares.view(self.shape.heads, -1).sum(-1)

    def _add_channels(self, squares: Tensor, index: int) -> None:
        self.intermediate[index] += squares

    def _block_hook(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            cosine = F.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
            turned = (1 - cosine).mean(-1).double()
            self.layer[0, index] += (turned * self.weights).sum()

        return hook


@torch.no_grad()
def measure(
    model: CausalLM, sequences: Tensor, context: DistributedContext, micro_batch: int
) -> dict[str, Tensor]:
    """Importance of the units of all families over `sequences` [n, S]; collective.

    Every rank gets all sequences and runs its share; the result is the same on all ranks. Each
    value is a sum over sequences, [rows, units] fp64 on the CPU, non-negative.
    """
    device = context.device
    with ActivationStatistics(model) as statistics:
        step = micro_batch * context.world
        for start in range(0, len(sequences), step):
            own = start + context.rank * micro_batch + torch.arange(micro_batch)
            # Ranks without work left run a sequence that does not count: gathers are collective.
            statistics.weights = (own < len(sequences)).double().to(device)
            ids = sequences[own.clamp(max=len(sequences) - 1)].to(device)
            model(ids, targets=ids, weights=torch.zeros(ids.shape, device=device))
        return statistics.reduce(context)


def standardise(importance: Tensor) -> Tensor:
    """ln(importance) with mean 0 and standard deviation 1 in each row, fp32; 0 in constant rows."""
    logs = importance.double().clamp(min=1e-30).log()
    centred = logs - logs.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(deviation > 1e-9, centred / deviation.clamp(min=1e-9), 0.0).float()


def initial_scores(
    members: dict[str, Family],
    config: MaskConfig,
    importance: dict[str, Tensor] | None,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Scores [rows, units] fp32 to start from; `importance` may be None for flat scores."""
    generator = torch.Generator().manual_seed(seed)
    paper = config.rule == "paper"
    scores = {}
    for name, family in members.items():
        if config.initial == "importance":
            assert importance is not None
            values = standardise(importance[name]) + (PAPER_IMPORTANCE_MEAN if paper else 0.0)
        else:
            noise = torch.randn(family.rows, family.units, generator=generator)
            values = FLAT_STD * noise + (PAPER_FLAT_MEAN if paper else 0.0)
        scores[name] = values.to(device)
    return scores
