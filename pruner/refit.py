"""Refitting a pruned model in closed form, so that its residual stream follows the source's.

The source's and the pruned model's streams over the same calibration text are carried from block to
block. Matrices that read the stream are refitted to the source's own outputs of the kept rows,
given what the pruned model reads; matrices that write to it, to the source's stream in the kept
dimensions. Each is a ridge regression towards the weights that pruning left:

    min over D of  |A (W + D)^T - R|^2 + ridge * mean(diag(A^T A)) * |D|^2

A are the matrix's inputs in the pruned model, so that each block answers for what the blocks before
it got wrong (as in OSSCAR, arXiv 2403.12983, and ZipLM, arXiv 2302.04089; those fit a layer's own
output). The last writer in front of removed blocks is fitted to the stream behind them.

A few channels are thousands of times stronger than all others at the first position of a sequence
("massive activations", arXiv 2402.17762). Where that position is fitted, the mean goes without the
largest 2%, which would hold everything where it is.

Only weights that were not trained since they were cut gain by it.
"""

import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pruner.extract import Extraction
from pruner.kept_blocks import KeptBlocks
from pruner.ridge import Apart, Ridge
from trainer.models.config import ModelConfig
from trainer.models.families import Role
from trainer.models.masks import LayerMasks
from trainer.models.rope import inverse_frequencies, rotary_tables
from trainer.parallel import DistributedContext

_UNMASKED = LayerMasks()


class Half(NamedTuple):
    """Attention or feed-forward layer of a block, by the names of its modules."""

    norm: str
    module: str
    readers: tuple[str, ...]
    """What reads the normed stream; all get the same inputs."""
    writer: str
    """What writes to the stream."""
    attends: bool


def halves(config: ModelConfig) -> tuple[Half, Half]:
    """The attention and the feed-forward half of a block."""
    modules = config.traits.names.modules
    norms = [name for name, role in modules.items() if role is Role.NORM]

    def half(norm: str, writer: Role, *readers: Role) -> Half:
        own = tuple(name for name, role in modules.items() if role in readers)
        output = config.traits.names.with_role(writer)
        attends = writer is Role.ATTENTION_OUTPUT
        return Half(norm, output.rpartition(".")[0], own, output, attends)

    attention = half(norms[0], Role.ATTENTION_OUTPUT, Role.QUERIES, Role.KEYS, Role.FUSED)
    return attention, half(norms[1], Role.FEED_FORWARD_OUTPUT, Role.CHANNELS)


class Block:
    """One block, run half by half in `dtype`; a refit changes its parameters in their own.

    It is number `index` of its model; `tensors` are its parameters by their names inside the block.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        tensors: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        *,
        fitted: bool = False,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.dtype = dtype
        self.fitted = fitted
        """Whether its matrices are what a refit made of them."""
        with torch.device("meta"):
            block = pkgutil.resolve_name(config.traits.block)
            self.module: nn.Module = block(config, config.blocks[index])
        self.sizes = config.blocks[index]
        values = {name: t.to(device, dtype) for name, t in tensors.items()}
        self.module.load_state_dict(values, assign=True)
        self.frequencies = inverse_frequencies(config).to(device)

    def has(self, half: Half) -> bool:
        """Whether it has this half."""
        return bool(self.sizes.num_heads if half.attends else self.sizes.intermediate_size)

    def update(self, half: Half, stream: Tensor) -> Tensor:
        """What a half adds to the stream [B, S, d] that it reads."""
        normed = self.normed(half, stream)
        module = self.module.get_submodule(half.module)
        arguments: tuple[Any, ...] = (_UNMASKED,)
        if half.attends:
            tables = rotary_tables(self.frequencies, stream.shape[1], stream.dtype)
            arguments = (*tables, _UNMASKED)
        update: Tensor = module(normed, *arguments)
        return update

    def normed(self, half: Half, stream: Tensor) -> Tensor:
        """What the readers of a half get, [B, S, d]."""
        normed: Tensor = self.module.get_submodule(half.norm)(stream)
        return normed

    def linear(self, name: str) -> nn.Linear:
        """The matrix called `name` inside the block."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def change(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """Adds to weight and bias of the matrix called `name` inside the block."""
        for key, change in ((f"{name}.weight", weight), (f"{name}.bias", bias)):
            if change is not None:
                tensor = self.tensors[key]
                self.tensors[key] = (tensor.double() + change.to(tensor.device)).to(tensor.dtype)
                self.module.get_parameter(key).copy_(self.tensors[key])

    @contextmanager
    def watch(self, *names: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Fills a dictionary with (input, output) of the matrices called `names` as they run."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Any:
            def keep(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                # The rotation of positions works in place.
                seen[name] = (inputs[0], output.clone())

            return keep

        handles = [self.linear(name).register_forward_hook(hook(name)) for name in names]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


@dataclass(slots=True)
class Streams:
    """A batch of sequences on its way through both models; fp32 [B, S, d] on the host."""

    source: Tensor
    pruned: Tensor
    source_read: Tensor
    """What the next half of the source reads; in blocks whose halves run in parallel, the stream in
    front of the block."""
    pruned_read: Tensor


class Refit:
    """Carries streams from block to block and refits the pruned one's matrices on the way.

    Args:
        extraction: what is kept of the source.
        ids: [n, S] this rank's calibration sequences, on the CPU.
        ridge: weight of the penalty, relative to the mean square of a matrix's inputs.
        batch: sequences that are computed at once.
        held_out: how many of the sequences, the last ones, are carried along and not fitted.

    The host holds the two streams of all `ids` in fp32: n * S * (d + d') * 4 bytes, twice that for
    parallel blocks; the device one block of each model and one batch. On a CPU the inputs of one
    writer are kept as well: n * S numbers for each channel, in the compute dtype.
    """

    def __init__(
        self,
        extraction: Extraction,
        ids: Tensor,
        *,
        ridge: float,
        batch: int,
        context: DistributedContext,
        held_out: int = 0,
    ) -> None:
        self.extraction = extraction
        cut = len(ids) - held_out
        self.parts = [part for ids in (ids[:cut], ids[cut:]) for part in ids.split(batch)]
        self.parts = [part for part in self.parts if len(part)]
        """Sequences that are computed together."""
        self.fitted = -(-cut // batch)
        """How many of these parts are fitted."""
        self.ridge = ridge
        self.context = context
        self.device = context.device
        self.attention, self.feed_forward = halves(extraction.source)
        self.parallel = extraction.source.parallel_residual
        self.streams: list[Streams] = []
        self.pending: tuple[Half, Block] | None = None
        """The last kept half, whose writer has not written yet, and its block."""

    @torch.no_grad()
    def embed(self, embedding: Tensor) -> None:
        """Starts the streams from the source's embedding [V, d]."""
        weight = embedding.float()
        for ids in self.parts:
            source = F.embedding(ids, weight)
            pruned = self._kept(source).contiguous()
            self.streams.append(Streams(source, pruned, source, pruned))

    def _kept(self, stream: Tensor) -> Tensor:
        """The source's stream in the dimensions that are kept, as the pruned model has it."""
        masks = self.extraction.stream
        if masks.mask is not None:
            stream = stream * masks.mask.to(stream)
        return stream if masks.units is None else stream[..., masks.units.to(stream.device)]

    def _on_device(self, stream: Tensor, block: Block | None = None) -> Tensor:
        """`stream` on the device; in the type that `block` computes in, if it reads it."""
        dtype = stream.dtype if block is None else block.dtype
        return stream.to(self.device, dtype, non_blocking=True)

    @torch.no_grad()
    def approach(self, source: Block, pruned: Block) -> None:
        """Passes the attention of a block of the source, if what is kept of it, `pruned`, has none;
        the writer that waits may then make up for it. Comes before `keep`."""
        if not pruned.has(self.attention):
            self._skip(self.attention, source)

    @torch.no_grad()
    def keep(self, index: int, source: Block, pruned: Block) -> None:
        """Passes block `index` of the source, which is kept as `pruned`; its last writer waits."""
        assert self.pending is None
        units = self.extraction.blocks[index].units
        rows = {
            name: {
                Role.QUERIES: units.queries,
                Role.KEYS: units.keys,
                Role.FUSED: units.fused,
                Role.CHANNELS: units.channels,
            }[self.extraction.names.modules[name]]
            for name in (*self.attention.readers, *self.feed_forward.readers)
        }
        for half in (self.attention, self.feed_forward):
            if not pruned.has(half):
                if half is self.feed_forward:
                    self._skip(half, source)
                continue
            self.finish_pending()
            if pruned.fitted:
                self._skip(half, source)
            else:
                self._fit_readers(half, source, pruned, rows)
            self.pending = half, pruned

    @torch.no_grad()
    def skip(self, source: Block) -> None:
        """Passes a block of the source that is removed."""
        for half in (self.attention, self.feed_forward):
            self._skip(half, source)

    def _skip(self, half: Half, source: Block) -> None:
        for streams in self.streams:
            self._advance_source(half, source, streams)

    @torch.no_grad()
    def finish_pending(self) -> Block | None:
        """Refits the writer that waits to the source's stream as it is now; returns its block."""
        if self.pending is None:
            return None
        (half, block), self.pending = self.pending, None
        self._write(half, block)
        return block

    def _write(self, half: Half, block: Block) -> None:
        """Refits what writes in a half, and moves the pruned model's streams past that half."""
        inputs = [] if block.fitted else self._fit_writer(half, block)
        self._advance(half, block, inputs)

    def _fit_readers(
        self, half: Half, source: Block, pruned: Block, rows: dict[str, Tensor | None]
    ) -> None:
        """Refits what reads in a half, and moves the source's streams past that half."""
        equations = Ridge([pruned.linear(name) for name in half.readers])
        apart = Apart()
        for streams in self.streams[: self.fitted]:
            wanted = self._kept(streams.source_read)
            apart.add(wanted, wanted - streams.pruned_read)
        for number, streams in enumerate(self.streams):
            with source.watch(*half.readers) as seen:
                self._advance_source(half, source, streams)
            if number >= self.fitted:
                continue
            inputs = pruned.normed(half, self._on_device(streams.pruned_read, pruned))
            missing = []
            for name in half.readers:
                wanted, own = seen[name][1], rows[name]
                if own is not None:
                    wanted = wanted[..., own.to(wanted.device)]
                missing.append(wanted.float() - pruned.linear(name)(inputs))
            equations.add(inputs, torch.cat(missing, dim=-1))
        self._change(pruned, half.readers, equations, apart)

    def _fit_writer(self, half: Half, block: Block) -> list[Tensor]:
        """Refits what writes in a half to the source's stream; its inputs, if they stay at hand.

        They do on a CPU. From a GPU they would have to go to the host and back, so that they are
        computed again.
        """
        kept = []
        apart = Apart()
        equations = Ridge([block.linear(half.writer)])
        for streams in self.streams[: self.fitted]:
            with block.watch(half.writer) as seen:
                update = block.update(half, self._on_device(streams.pruned_read, block))
            wanted = self._kept(self._on_device(streams.source))
            missing = wanted - self._on_device(streams.pruned) - update
            inputs = seen[half.writer][0]
            equations.add(inputs, missing)
            apart.add(wanted, missing)
            if self.device.type == "cpu":
                kept.append(inputs)
        self._change(block, (half.writer,), equations, apart)
        return kept

    def _change(self, block: Block, names: tuple[str, ...], equations: Ridge, apart: Apart) -> None:
        if not apart.lost(self.context):
            equations.add_first()
        changes = equations.solve(self.ridge, self.context)
        for name, (weight, bias) in zip(names, changes, strict=True):
            block.change(name, weight, bias)

    def _advance(self, half: Half, block: Block, inputs: list[Tensor]) -> None:
        """Moves the pruned model's streams past a half; `inputs` are what its writer reads of the
        first of them."""
        for number, streams in enumerate(self.streams):
            if number < len(inputs):
                update = block.linear(half.writer)(inputs[number])
            else:
                update = block.update(half, self._on_device(streams.pruned_read, block))
            streams.pruned = (self._on_device(streams.pruned) + update).cpu()
            if self._moves_on(half, block):
                streams.pruned_read = streams.pruned

    def _advance_source(self, half: Half, source: Block, streams: Streams) -> None:
        update = source.update(half, self._on_device(streams.source_read, source))
        streams.source = (self._on_device(streams.source) + update).cpu()
        if self._moves_on(half, source):
            streams.source_read = streams.source

    def _moves_on(self, half: Half, block: Block) -> bool:
        """Whether what comes behind `half` of `block` reads the stream with its update."""
        return not (self.parallel and half.attends and block.has(self.feed_forward))


def refit(
    extraction: Extraction,
    tensors: Iterable[tuple[str, Tensor]],
    ids: Tensor,
    *,
    ridge: float,
    batch: int,
    context: DistributedContext,
    dtype: torch.dtype = torch.float32,
    kept: Path | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The pruned model's (name, tensor), refitted; collective. See `Refit` and `carry`."""
    work = Refit(extraction, ids, ridge=ridge, batch=batch, context=context)
    return carry(work, tensors, dtype=dtype, kept=kept)


def carry(
    work: Refit,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    kept: Path | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The pruned model's (name, tensor), refitted by `work`, whose streams then are those in front
    of the final norms; collective.

    Args:
        work: before anything is carried.
        tensors: the source's, whose blocks come in order behind the embedding.
        dtype: what blocks compute in; streams and equations are in fp32 and fp64 in any case.
        kept: folder of the blocks that are refitted already, by an interrupted refit of the same
            model on the same sequences; their streams are carried on without fitting.
    """
    extraction = work.extraction
    files = KeptBlocks(kept, work.context)
    prefix = f"{extraction.names.blocks}."
    numbers = {index: number for number, index in enumerate(extraction.blocks)}
    outer: dict[str, Tensor] = {}
    last = -1

    def finished() -> Iterator[tuple[str, Tensor]]:
        block = work.finish_pending()
        if block is not None:
            if not block.fitted:
                files.keep(numbers[last], block.tensors)
            for name, tensor in block.tensors.items():
                yield f"{prefix}{numbers[last]}.{name}", tensor

    for index, group in _by_block(tensors, prefix):
        if index is None:
            outer |= group
            if f"{extraction.names.embedding}.weight" in group:
                work.embed(group[f"{extraction.names.embedding}.weight"])
            continue
        inner = {name.removeprefix(f"{prefix}{index}."): t for name, t in group.items()}
        source = Block(extraction.source, index, inner, work.device, dtype)
        if index not in numbers:
            work.skip(source)
            continue
        fitted, start = files.read(numbers[index]), f"{prefix}{numbers[index]}."
        # Where nothing is cut they are the source's own, which stay as they are.
        cut = extraction.tensors(group.items())
        own = fitted or {name.removeprefix(start): tensor.clone() for name, tensor in cut}
        fits = {"fitted": fitted is not None}
        pruned = Block(extraction.config, numbers[index], own, work.device, dtype, **fits)
        work.approach(source, pruned)
        yield from finished()
        work.keep(index, source, pruned)
        last = index
    yield from finished()
    yield from extraction.tensors(outer.items())


def _by_block(
    tensors: Iterable[tuple[str, Tensor]], prefix: str
) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """Neighbouring tensors of the same block together; None for those outside the blocks."""
    group: dict[str, Tensor] = {}
    last: int | None = None
    for name, tensor in tensors:
        inside = name.startswith(prefix)
        index = int(name.removeprefix(prefix).partition(".")[0]) if inside else None
        if group and index != last:
            yield last, group
            group = {}
        group[name], last = tensor, index
    if group:
        yield last, group
