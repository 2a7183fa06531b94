"""Muon: matrices move along their orthogonalised momentum, everything else by AdamW.

The update is Keller Jordan's (kellerjordan.github.io/posts/muon), its size that of Moonlight (arXiv
2502.16982, section 2.2), by which Muon works with AdamW's learning rate and weight decay.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from trainer.adamw import LocalAdamW
from trainer.parallel import to_local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in an iteration on the singular values x."""
ITERATIONS = 5
"""They bring every value from 0.002 to 1 to between 0.68 and 1.21."""
SMALLEST_NORM = 1e-7
"""What a matrix is divided by at least: one of zeros stays zero."""
RMS = 0.2
"""Root mean square of an update per learning rate, about that of AdamW's updates in training."""
BATCH = 1 << 26
"""Numbers of whole matrices that a rank works on between two exchanges."""


class Muon(LocalAdamW):
    """AdamW, except that groups with a `momentum` are matrices updated by Muon.

    Such a group also states `head_rows`: the rows of a head's query, of its key and of its value
    where one matrix holds them of head after head, else 0. Gradients and weights are sharded by
    rows, and so is the momentum. A matrix is orthogonalised whole, by one of the ranks that share
    it: they send it their parts and get the update's. HSDP's replicas all do the same, and stay
    equal on processors of one kind. `step` is collective.

    Rows and columns whose gradients have always been zero get no update, as of units that are off.
    Those whose gradients became zero move on by a momentum that fades, as with AdamW. The size of
    an update is that of the whole matrix: if only half of its rows and columns are computed, theirs
    is larger by a factor of up to the square root of 2.

    Args:
        groups: parameter groups, each with its `weight_decay`.
        dtype: what is orthogonalised in; weights and momentum keep theirs.
        options: of torch.optim.AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        """AdamW's own mends the state of old versions of PyTorch, and wants Adam's of every
        parameter."""
        torch.optim.Optimizer.__setstate__(self, state)

    def _init_group(
        self, group: dict[str, Any], parameters: list[Tensor], *lists: list[Tensor]
    ) -> bool:
        """Leaves to AdamW what it is to update."""
        return "momentum" not in group and super()._init_group(group, parameters, *lists)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            if "momentum" in group:
                self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not matrices:
            return
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        weights = [to_local(matrix) for matrix in matrices]
        gradients = [to_local(matrix.grad) for matrix in matrices]
        momenta = [to_local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        head_rows = group["head_rows"]
        ranks = _ranks_of(matrices[0])
        limit = BATCH * ranks.size() if ranks else 0
        for batch in _batches([matrix.numel() for matrix in matrices], limit):
            # Nesterov's: where the momentum will be after the same gradient once more.
            ahead = [gradients[i].lerp(momenta[i], group["momentum"]).to(self.dtype) for i in batch]
            shapes = [matrices[i].shape for i in batch]
            updates = _orthogonalised_shards(ahead, shapes, head_rows, ranks)
            for i, (rows, columns), update in zip(batch, shapes, updates, strict=True):
                longest = max(rows // 3 if head_rows else rows, columns)
                weights[i].add_(update, alpha=-group["lr"] * RMS * longest**0.5)


def orthogonalised(matrix: Tensor, head_rows: int = 0) -> Tensor:
    """[rows, columns] -> the same shape and dtype: about U V' of the decomposition U S V'.

    torch.optim.Muon does the same in bf16 only, which most CPUs emulate; what it calls private.
    """
    if head_rows:
        # Query, key and value apart, as in models that have three matrices: their gradients differ
        # in size, and the largest would take most of a common update.
        parts = matrix.unflatten(0, (-1, 3, head_rows)).unbind(1)
        done = [orthogonalised(part.flatten(0, 1)).unflatten(0, (-1, head_rows)) for part in parts]
        return torch.stack(done, dim=1).flatten(0, 2)
    first, third, fifth = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        square = x @ x.T
        factor = torch.addmm(square, square, square, beta=third, alpha=fifth)
        x = torch.addmm(x, factor, x, beta=first)
    return x.T if tall else x


def _ranks_of(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold different rows of a parameter; None where one holds all."""
    if isinstance(parameter, DTensor):
        for dimension, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and parameter.device_mesh.size(dimension) > 1:
                return parameter.device_mesh.get_group(dimension)
    return None


def _orthogonalised_shards(
    shards: list[Tensor],
    shapes: list[torch.Size],
    head_rows: int,
    ranks: dist.ProcessGroup | None,
) -> list[Tensor]:
    """This rank's rows of matrices of `shapes` -> its rows of them orthogonalised; collective."""
    if ranks is None:
        return [orthogonalised(shard, head_rows) for shard in shards]
    world, rank = ranks.size(), ranks.rank()
    owners = _owners([rows * columns * min(rows, columns) for rows, columns in shapes], world)
    order = sorted(range(len(shards)), key=owners.__getitem__)
    own = [i for i in order if owners[i] == rank]
    rows = {i: _rows_of_ranks(shapes[i][0], world) for i in own}
    sizes = [[rows[i][source] * shapes[i][1] for i in own] for source in range(world)]
    gathered = [sum(part) for part in sizes]
    scattered = [0] * world
    for owner, shard in zip(owners, shards, strict=True):
        scattered[owner] += shard.numel()
    parts = torch.cat([shards[i].flatten() for i in order])
    wholes = parts.new_empty(sum(gathered))
    dist.all_to_all_single(wholes, parts, gathered, scattered, group=ranks)
    pieces = wholes.split([size for part in sizes for size in part])
    for position, i in enumerate(own):
        mine = pieces[position :: len(own)]
        whole = orthogonalised(torch.cat(mine).view(shapes[i]), head_rows)
        for piece, update in zip(mine, whole.split(rows[i]), strict=True):
            piece.copy_(update.flatten())
    dist.all_to_all_single(parts, wholes, scattered, gathered, group=ranks)
    updates = dict(zip(order, parts.split([shards[i].numel() for i in order]), strict=True))
    return [updates[i].view_as(shard) for i, shard in enumerate(shards)]


def _owners(costs: list[int], world: int) -> list[int]:
    """The rank for each piece of work: the largest first, to the rank with the least so far."""
    loads, owners = [0] * world, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _rows_of_ranks(rows: int, world: int) -> list[int]:
    """How many rows each rank has, divided as by torch.chunk: the last ranks may have none."""
    most = -(-rows // world)
    return [max(0, min(most, rows - rank * most)) for rank in range(world)]


def _batches(sizes: list[int], limit: int) -> Iterator[list[int]]:
    """Indices of `sizes` in order, in runs of at most `limit` in sum or of one."""
    batch: list[int] = []
    for index, size in enumerate(sizes):
        if batch and sum(sizes[i] for i in batch) + size > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
