"""How important each unit of the source is, by one of three measures.

importance  Activations over a calibration set as in Minitron (arXiv 2407.14679, section 2.2): the
            mean of |x| over the tokens of a sequence, then the sum of squares over sequences.
            Blocks by how much they turn the residual stream: one minus the cosine of input and
            output (ShortGPT, arXiv 2403.03853).
taylor      First-order estimate of the loss without the unit (arXiv 1906.10771, section 3, with
            the unit's mask as its weight): the mean over sequences of |d loss / d z| at z = 1.
magnitude   Norm of the unit's weights; needs no text.

What is measured on text is measured on bootstrap replicates of it as well, so that ranks which
another draw of the text would change can be told from those it would not.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.progress import Progress
from pruner.shapes import Shape, shape_of
from pruner.units import UnitKind, measured_sizes, to_masks, top_units
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.families import Names, Role
from trainer.parallel import DistributedContext
from trainer.saving import full_tensors

_READERS = {
    Role.QUERIES: "query_head",
    Role.KEYS: "kv_group",
    Role.FUSED: "kv_group",
    Role.CHANNELS: "intermediate",
}
"""Matrices whose columns read the residual stream, and the kind of units in their rows."""
_WRITERS = {Role.ATTENTION_OUTPUT: "query_head", Role.FEED_FORWARD_OUTPUT: "intermediate"}
"""Matrices whose rows write to the residual stream, and the kind of units in their columns."""
FIRST_SHARE = 1 / 256
"""Least share of the first position of a sequence in what is measured. A few channels write a huge
stream there, which all heads attend to ("massive activations", arXiv 2402.17762): without these
channels attention falls apart, and in long sequences a plain mean would not see them."""
REPLICATES = 32
"""Bootstrap replicates of a calibration set."""
SURE = 0.95
"""Share of the replicates in which a unit must be kept, or left out, not to be in doubt."""


class ActivationStatistics:
    """Forward hooks that accumulate the importance of every unit; use as a context manager.

    `weights` [B, C] says how much each sequence of the next forward pass counts (0 for padding), in
    each of C sums.
    """

    def __init__(self, model: CausalLM, sums: int) -> None:
        self.model = model
        self.shape = shape_of(model.config)
        self.sums = sums
        self.weights = torch.ones(0)
        self.device = next(model.parameters()).device
        shape = self.shape
        self.hidden = self._zeros(shape.hidden)
        self.layer = self._zeros(shape.layers)
        self.heads = self._zeros(shape.layers, shape.heads)
        self.intermediate = self._zeros(shape.layers, shape.ffn)
        self._handles: list[Any] = []

    def __enter__(self) -> "ActivationStatistics":
        for index, block in enumerate(self.model.blocks):
            # One of the readers behind each of the two norms.
            attention = Role.FUSED if self.model.config.traits.fused_qkv else Role.QUERIES
            self._watch(block, attention, self._add_hidden)
            self._watch(block, Role.CHANNELS, self._add_hidden)
            self._watch(block, Role.ATTENTION_OUTPUT, self._add_heads, index)
            self._watch(block, Role.FEED_FORWARD_OUTPUT, self._add_channels, index)
            self._handles.append(block.register_forward_hook(self._block_hook(index)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def reduce(self, context: DistributedContext) -> dict[str, Tensor]:
        """Importance of each kind's units [C, rows, units], fp64 on the CPU, summed over ranks."""
        sums = [self.hidden, self.layer, self.heads, self.intermediate]
        hidden, layer, heads, intermediate = (context.all_reduce_sum(s).cpu() for s in sums)
        grouped = heads.view(self.sums, -1, self.shape.group)
        return {
            "hidden": hidden[:, None],
            "layer": layer[:, None],
            "kv_group": grouped.sum(-1).view(self.sums, self.shape.layers, self.shape.kv_heads),
            "query_head": grouped,
            "intermediate": intermediate,
        }

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(self.sums, *size, dtype=torch.float64, device=self.device)

    def _watch(
        self, block: nn.Module, role: Role, add: Callable[..., None], *arguments: int
    ) -> None:
        """Has `add` called with the strength of the inputs of a block's first module of `role`."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            strength = inputs[0].detach().float().abs()
            shares = position_shares(strength.shape[1], strength.device)
            per_sequence = torch.einsum("bsn,s->bn", strength, shares).double().square()
            add(self.weights.t() @ per_sequence, *arguments)

        module = block.get_submodule(self.model.names.with_role(role))
        self._handles.append(module.register_forward_pre_hook(hook))

    def _add_hidden(self, squares: Tensor) -> None:
        self.hidden += squares

    def _add_heads(self, squares: Tensor, index: int) -> None:
        self.heads[:, index] += squares.view(self.sums, self.shape.heads, -1).sum(-1)

    def _add_channels(self, squares: Tensor, index: int) -> None:
        self.intermediate[:, index] += squares

    def _block_hook(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            cosine = F.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
            shares = position_shares(cosine.shape[1], cosine.device)
            change = ((1 - cosine) @ shares).double()
            self.layer[:, index] += self.weights.t() @ change

        return hook


def position_shares(length: int, device: torch.device) -> Tensor:
    """Share of each position of a sequence in what is measured: [S] fp32, with sum 1."""
    first = max(FIRST_SHARE, 1 / length)
    shares = torch.full((length,), (1 - first) / max(1, length - 1), device=device)
    shares[0] = first
    return shares


def measure(
    kind: str,
    model: CausalLM,
    sequences: Tensor,
    context: DistributedContext,
    micro_batch: int,
) -> dict[str, Tensor]:
    """Importance of the units of all kinds: [C, rows, units] fp64 on the CPU, non-negative; on the
    calibration set and, where it is of text, on its replicates (C = 1 + REPLICATES).

    `kind` is "importance", "taylor" or "magnitude"; `sequences` [n, S] is the calibration set.
    Collective: every rank gets all sequences and runs its share; the result is the same on all.
    """
    if kind == "magnitude":
        return {name: values[None] for name, values in magnitudes(model).items()}
    if kind == "taylor":
        return taylor(model, sequences, context)
    return activations(model, sequences, context, micro_batch)


@torch.no_grad()
def activations(
    model: CausalLM, sequences: Tensor, context: DistributedContext, micro_batch: int
) -> dict[str, Tensor]:
    """Strength of the units' activations, summed over `sequences` [n, S]; see `measure`."""
    counts = replicate_counts(len(sequences))
    with ActivationStatistics(model, counts.shape[1]) as statistics:
        batches = calibration_batches(sequences, context, micro_batch, "measure importance", counts)
        for weights, ids in batches:
            statistics.weights = weights
            model(ids, targets=ids, weights=torch.zeros(ids.shape, device=ids.device))
        return statistics.reduce(context)


def replicate_counts(number: int) -> Tensor:
    """How often each of `number` sequences counts [number, 1 + REPLICATES], fp64: once in the set
    itself, a Poisson number of times in a replicate, so that sums can be taken in one pass (Hanley
    and MacGibbon, "Creating non-parametric bootstrap samples using Poisson frequencies", 2006)."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.poisson(torch.ones(number, REPLICATES, dtype=torch.float64), generator=draw)
    return torch.cat([torch.ones(number, 1, dtype=torch.float64), drawn], dim=1)


def in_doubt(importance: dict[str, Tensor], kinds: dict[str, UnitKind]) -> dict[str, int]:
    """How many units of each kind would be kept in some replicates and not in others, if the most
    important were; empty where nothing was measured on replicates.

    `importance` as from `measure`.
    """
    found = {}
    for name, kind in kinds.items():
        replicates = importance[name][1:]
        if len(replicates):
            kept = torch.zeros_like(replicates).scatter_(-1, top_units(replicates, kind.target), 1)
            share = kept.mean(0)
            found[name] = int(((share > 1 - SURE) & (share < SURE)).sum())
    return found


def calibration_batches(
    sequences: Tensor,
    context: DistributedContext,
    micro_batch: int,
    description: str,
    counts: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of `sequences` [n, S]: their rows of `counts` [n, ...], by default fp64
    ones [n], and ids [B, S]; equally many batches on every rank, the last of what is left.
    `description` names the work in the progress."""
    counts = torch.ones(len(sequences), dtype=torch.float64) if counts is None else counts
    with Progress(description, total=len(sequences), unit="sequence", transient=True) as bar:
        for start in range(0, len(sequences), micro_batch * context.world):
            passed = slice(start, start + micro_batch * context.world)
            mine = slice(context.rank * micro_batch, (context.rank + 1) * micro_batch)
            ids, weights = sequences[passed][mine], counts[passed][mine]
            if not len(ids):
                # Ranks without work left run a sequence that does not count: gathers are
                # collective.
                ids, weights = sequences[start : start + 1], 0 * counts[start : start + 1]
            yield weights.to(context.device), ids.to(context.device)
            bar.update(len(sequences[passed]))


def taylor(model: CausalLM, sequences: Tensor, context: DistributedContext) -> dict[str, Tensor]:
    """Mean over `sequences` [n, S] of |gradient of a sequence's mean token loss|, for the mask of
    every unit; see `measure`.

    One sequence per rank and pass, because absolute values are taken per sequence. No gradients of
    weights are computed.
    """
    shape, device = shape_of(model.config), context.device
    z = {
        name: torch.ones(size, device=device, requires_grad=True)
        for name, size in measured_sizes(shape).items()
    }
    replicates = replicate_counts(len(sequences))
    sums = {
        name: torch.zeros(replicates.shape[1], *size, dtype=torch.float64, device=device)
        for name, size in measured_sizes(shape).items()
    }
    batches = calibration_batches(sequences, context, 1, "measure importance", replicates)
    for counts, ids in batches:
        targets, valid = next_token_targets(ids)
        weights = valid.float() / valid.sum()
        loss = model(ids, masks=to_masks(z, shape), targets=targets, weights=weights).loss
        gradients = torch.autograd.grad(loss, list(z.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += counts.view(-1, 1, 1) * gradient.double().abs()
    return {
        name: context.all_reduce_sum(total).cpu() / len(sequences) for name, total in sums.items()
    }


@torch.no_grad()
def magnitudes(model: CausalLM) -> dict[str, Tensor]:
    """Euclidean norm of the weights in matrices that a unit's removal would remove; see `measure`.

    A query head's are its rows of q_proj and columns of o_proj; a KV head's those of all its query
    heads and its rows of k_proj and v_proj. Every rank gathers the matrices one at a time.
    """
    shape = shape_of(model.config)
    squares = {
        name: torch.zeros(size, dtype=torch.float64) for name, size in measured_sizes(shape).items()
    }
    for name, tensor in full_tensors(model):
        if tensor.ndim == 2:
            rows, columns = (
                torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float64).square()
                for dim in (1, 0)
            )
            _add_matrix(squares, model.names, name, rows, columns, shape)
    return {name: values.sqrt() for name, values in squares.items()}


def _add_matrix(
    squares: dict[str, Tensor],
    names: Names,
    name: str,
    rows: Tensor,
    columns: Tensor,
    shape: Shape,
) -> None:
    """Adds the sums of squares of a matrix's rows [out] and columns [in] to its units."""
    prefix = f"{names.blocks}."
    if not name.startswith(prefix):
        # Embedding and head, [vocabulary, hidden].
        squares["hidden"][0] += columns
        return
    index, _, part = name.removeprefix(prefix).partition(".")
    layer, role = int(index), names.modules[part.rpartition(".")[0]]
    reads = role in _READERS
    kind = _READERS[role] if reads else _WRITERS[role]
    units, hidden = (rows, columns) if reads else (columns, rows)
    squares["hidden"][0] += hidden
    squares["layer"][0, layer] += units.sum()
    if kind == "intermediate":
        squares[kind][layer] += units
        return
    squares["kv_group"][layer] += units.view(shape.kv_heads, -1).sum(-1)
    if kind == "query_head":
        first = layer * shape.kv_heads
        heads = units.view(shape.kv_heads, shape.group, -1).sum(-1)
        squares[kind][first : first + shape.kv_heads] += heads
