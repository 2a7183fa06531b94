"""What each block, or layer of one, is worth, by the criteria in the field's use; the least score
goes first.

ppl        Perplexity without the block (Shortened LLaMA, arXiv 2402.02834, section 3.1; SLEB, arXiv
           2402.09025).
taylor     |sum over the text of weight * gradient|, summed over the block's weights (there, from
           arXiv 1906.10771): the sum over the text keeps its sign, the absolute value comes after.
magnitude  Sum of |weight| over the block's weights.
influence  One minus the cosine of the stream in front of a block and behind it (ShortGPT, arXiv
           2403.03853, equation 1), over all positions.
angular    Angle between the stream in front of a block and behind the n-th from it on, over pi
           (arXiv 2403.17887, equation 4; there at the last position of a text, here at all):
           that of the first of n blocks that go together.
reverse    How far a block is from the end.
random     A draw.

What is taken on text is kept for every sequence, so that scores have intervals.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError
from pruner.importance import calibration_batches
from pruner.refit import halves
from pruner.shorten.deletion import deletion_losses
from pruner.shorten.kept import KeptRows
from pruner.shorten.parts import Part, without
from pruner.shorten.ranking import REPLICATES, intervals, order_of, replicated
from trainer.evaluate import MOST_NATS, perplexity
from trainer.models.decoder import CausalLM, LossOutput, next_token_targets
from trainer.parallel import DistributedContext, to_local


@dataclass(frozen=True, slots=True)
class Scores:
    """One score for each part that could be removed: a block, or a layer of one."""

    values: list[float]
    """The least goes first; infinite where a block cannot go."""
    means: Tensor | None = None
    """[R, K] fp64: the same on bootstrap replicates of the text (ppl: its logarithm); None where no
    text, or all of it together, was read."""
    whole: float | None = None
    """The same measure of the intact model (ppl)."""
    nats: list[float] | None = None
    """Logarithms of the values (ppl), which are told apart where the values are infinite."""

    @property
    def order(self) -> list[int]:
        """Numbers of all parts, the least score first."""
        return order_of(self.values if self.nats is None else self.nats)

    @property
    def intervals(self) -> list[tuple[float, float]] | None:
        """95% intervals of the scores."""
        if self.means is None:
            return None
        pairs = intervals(self.means)
        if self.whole is None:
            return pairs
        return [(perplexity(low), perplexity(high)) for low, high in pairs]


@torch.no_grad()
def by_magnitude(model: CausalLM, parts: Sequence[Part], context: DistributedContext) -> Scores:
    """Of `parts`. Collective."""
    return Scores(_sums(model, parts, context, lambda own, _: own.double().abs().sum()))


def by_taylor(
    model: CausalLM, parts: Sequence[Part], sequences: Tensor, context: DistributedContext
) -> Scores:
    """Of `parts` on `sequences` [n, S], by gradients, which are left empty. Collective."""
    targets_in_all = sequences.shape[0] * (sequences.shape[1] - 1)
    for counts, ids in calibration_batches(sequences, context, 1, "gradients"):
        targets, valid = next_token_targets(ids)
        weights = valid.float() * counts[:, None].float() / targets_in_all
        output = model(ids, targets=targets, weights=weights)
        assert isinstance(output, LossOutput)
        output.loss.backward()

    def salience(own: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return (own.double() * gradient.double()).abs().sum()

    with torch.no_grad():
        found = Scores(_sums(model, parts, context, salience))
    model.zero_grad(set_to_none=True)
    return found


def _sums(
    model: CausalLM,
    parts: Sequence[Part],
    context: DistributedContext,
    salience: Callable[[Tensor, Tensor | None], Tensor],
) -> list[float]:
    """Sums over each part, norms with what reads them, of what `salience` says of a rank's share of
    a weight and of its gradient."""
    prefix = f"{model.names.blocks}."
    places = {part: place for place, part in enumerate(parts)}
    sums = torch.zeros(len(parts), dtype=torch.float64, device=context.device)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefix):
            continue
        index, _, inner = name.removeprefix(prefix).partition(".")
        attends = model.names.attends(inner.rpartition(".")[0])
        for kind in ("layer", "attention" if attends else "feed_forward"):
            place = places.get(Part(kind, int(index)))
            if place is not None:
                gradient = parameter.grad
                own = to_local(parameter.detach())
                sums[place] += salience(own, None if gradient is None else to_local(gradient))
    values: list[float] = context.all_reduce_sum(sums).tolist()
    return values


def by_perplexity(
    model: CausalLM,
    parts: Sequence[Part],
    sequences: Tensor,
    context: DistributedContext,
    batch: int,
    kept: KeptRows,
    removed: Sequence[int] = (),
) -> Scores:
    """Of `parts` on `sequences` [n, S], without those numbered `removed`, whose scores are
    infinite.

    Collective. Goes on behind the sequences of which `kept` has losses.

    Raises InputError where the model itself gives no finite loss, or a file cannot be written.
    """
    left = [part for place, part in enumerate(parts) if place not in removed]
    gone = [parts[place] for place in removed]
    masks = without(gone, model.config, context.device) if removed else None
    done = kept.rows
    start = 0 if done is None else len(done)
    for counts, ids in calibration_batches(sequences[start:], context, batch, "perplexity"):
        own = deletion_losses(model, ids, left, masks).t()[counts > 0]
        kept.add(torch.cat([rows.cpu() for rows in context.gather(own.cpu())]), context)
    assert kept.rows is not None
    return from_losses(kept.rows, sequences.shape[1], len(parts), removed)


def from_losses(rows: Tensor, seq_len: int, number: int, removed: Sequence[int] = ()) -> Scores:
    """Scores of `number` parts from summed losses `rows` [n, 1 + K] of sequences (deletion_losses)
    of `seq_len` tokens: of the model without the parts `removed`, then without one of the others
    each. Raises InputError where the model itself has no finite loss."""
    losses = rows / (seq_len - 1)
    if not losses[:, 0].isfinite().all():
        raise InputError(
            "the source's loss is not finite: its weights are damaged, or --precision does not "
            "suit it; use --precision fp32"
        )
    # A model without its first block may overflow: it cannot do without that block.
    most = 2 * max(MOST_NATS, float(losses[:, 0].max()))
    losses = losses.nan_to_num(nan=torch.inf).clamp(max=most)
    left = [index for index in range(number) if index not in removed]
    means = torch.full((REPLICATES, number), torch.inf, dtype=torch.float64)
    # Texts differ in how hard they are far more than blocks do, and in that all blocks are equal.
    intact = losses[:, :1]
    means[:, left] = replicated(losses[:, 1:] - intact) + intact.mean()
    nats = [math.inf] * number
    for index, mean in zip(left, losses[:, 1:].mean(0).tolist(), strict=True):
        nats[index] = mean
    values = [perplexity(mean) for mean in nats]
    return Scores(values, means, perplexity(losses[:, 0].mean().item()), nats)


class StreamAngles:
    """Forward hooks that take, for every block, the cosine of the stream in front of it and behind
    the `window`-th block from it on, averaged over positions, as `measure` of it; use as a context
    manager."""

    def __init__(self, model: CausalLM, window: int, measure: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.measure = measure
        self.found: list[Tensor] = []
        """[B] fp64 of each first block, after a forward pass."""
        self._streams: deque[Tensor] = deque(maxlen=window)
        self._handles: list[Any] = []

    def __enter__(self) -> "StreamAngles":
        final = self.model.get_submodule(self.model.names.final_norm)
        for module in (*self.model.blocks, final):
            self._handles.append(module.register_forward_pre_hook(self._add))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(self, _: Any, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach()
        if len(self._streams) == self._streams.maxlen:
            cosine = F.cosine_similarity(self._streams[0].float(), x.float(), dim=-1)
            self.found.append(self.measure(cosine.double()).mean(-1))
        self._streams.append(x)


class LayerAngles:
    """As StreamAngles, for the attention and feed-forward layers among `parts`, each by itself."""

    def __init__(
        self, model: CausalLM, parts: Sequence[Part], measure: Callable[[Tensor], Tensor]
    ) -> None:
        self.model = model
        self.parts = set(parts)
        self.measure = measure
        self.found: list[Tensor] = []
        """[B] fp64 of each of the parts, in the order of the model, after a forward pass."""
        self._stream: Tensor | None = None
        """[B, S, d]: what the next layer reads."""
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerAngles":
        for index, block in enumerate(self.model.blocks):
            self._handles.append(block.register_forward_pre_hook(self._begin))
            kinds = ("attention", "feed_forward")
            for kind, half in zip(kinds, halves(self.model.config), strict=True):
                hook = self._passed(Part(kind, index) in self.parts)
                module = block.get_submodule(half.module)
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, _: Any, inputs: tuple[Any, ...]) -> None:
        self._stream = inputs[0].detach()

    def _passed(self, wanted: bool) -> Callable[..., None]:
        def hook(_: Any, __: Any, update: Tensor) -> None:
            assert self._stream is not None
            behind = self._stream + update.detach()
            if wanted:
                cosine = F.cosine_similarity(self._stream.float(), behind.float(), dim=-1)
                self.found.append(self.measure(cosine.double()).mean(-1))
            if not self.model.config.parallel_residual:
                self._stream = behind

        return hook


@torch.no_grad()
def by_angle(
    model: CausalLM,
    parts: Sequence[Part],
    sequences: Tensor,
    context: DistributedContext,
    batch: int,
    window: int,
    measure: Callable[[Tensor], Tensor],
) -> Scores:
    """Of `parts` on `sequences` [n, S]; infinite for the last blocks, from which on there are not
    `window`. Collective."""
    rows = []
    whole = parts[0].kind == "layer"
    assert whole or window == 1
    for counts, ids in calibration_batches(sequences, context, batch, "angles of the stream"):
        watch: StreamAngles | LayerAngles = LayerAngles(model, parts, measure)
        if whole:
            watch = StreamAngles(model, window, measure)
        with watch as angles:
            model(ids, targets=ids, weights=torch.zeros(ids.shape, device=ids.device))
        own = torch.stack(angles.found, dim=1)[counts > 0]
        rows += context.gather(own.cpu())
    found = torch.cat(rows)
    number = len(parts)
    means = torch.full((REPLICATES, number), torch.inf, dtype=torch.float64)
    means[:, : found.shape[1]] = replicated(found)
    values: list[float] = found.mean(0).tolist()
    return Scores(values + [math.inf] * (number - len(values)), means)


def influence(cosine: Tensor) -> Tensor:
    """One minus it."""
    return 1 - cosine


def angle(cosine: Tensor) -> Tensor:
    """Its angle over pi."""
    return cosine.clamp(-1, 1).acos() / math.pi


def by_position(number: int) -> Scores:
    """The last of `number` parts goes first."""
    return Scores([float(number - 1 - index) for index in range(number)])


def by_chance(number: int, seed: int) -> Scores:
    """A permutation drawn from `seed`."""
    draw = torch.Generator().manual_seed(seed % 2**64)
    return Scores(torch.randperm(number, generator=draw).double().tolist())
