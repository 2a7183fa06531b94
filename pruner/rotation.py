"""Rotating the residual stream to its principal components, in which it is then pruned.

RMSNorm commutes with an orthogonal matrix Q once its gain is part of the matrices behind it, so a
model whose every reader of the residual stream is multiplied by Q and every writer by Q^T is the
same function (SliceGPT, arXiv 2401.15024, theorem 1). Its dimensions can then be the principal
components of what the norms read, and the ones that are pruned carry far less than the weakest of
the source's own. Where SliceGPT needs a rotation in every residual connection, one for the whole
model leaves an ordinary one.
"""

import torch
from torch import Tensor, nn

from data.errors import InputError
from pruner.importance import calibration_batches, position_shares
from trainer.models.decoder import CausalLM
from trainer.models.families import Role
from trainer.parallel import DistributedContext, full_tensor, local_region, reshard

GAIN_TOLERANCE = 0.2
"""Largest relative distance of a final gain from the median at which a dimension of a model with
tied embeddings is rotated with the others."""


class StreamCovariance:
    """Forward hooks that sum the outer products of what the norms read, each position
    scaled to a mean square of 1; use as a context manager.

    `weights` [B] says how much each sequence of the next forward pass counts (0 for padding).
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        width = model.config.hidden_size
        device = next(model.parameters()).device
        self.weights = torch.ones(0)
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "StreamCovariance":
        norms = [norm for block in self.model.blocks for norm in _norms(self.model, block)]
        for norm in (*norms, self.model.get_submodule(self.model.names.final_norm)):
            self._handles.append(norm.register_forward_pre_hook(self._add))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().float()
        shares = x.shape[1] * position_shares(x.shape[1], x.device)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.config.norm_eps)
        x = x * scale * shares.sqrt()[:, None]
        x = (x * self.weights[:, None, None].to(x.dtype)).flatten(0, -2)
        self.total += x.t() @ x


@torch.no_grad()
def measure_rotation(
    model: CausalLM, sequences: Tensor, context: DistributedContext, micro_batch: int
) -> Tensor:
    """`principal_rotation` of the loaded source on `sequences` [n, S]: on the CPU and the same on
    every rank; collective. Raises InputError when the stream is not finite."""
    with StreamCovariance(model) as covariance:
        batches = calibration_batches(sequences, context, micro_batch, "measure components")
        for weights, ids in batches:
            covariance.weights = weights
            model(ids, targets=ids, weights=torch.zeros(ids.shape, device=ids.device))
    total = context.all_reduce_sum(covariance.total)
    if not total.isfinite().all():
        raise InputError(
            "the residual stream of the source is not finite: its weights are damaged, or "
            "--precision does not suit it; use --precision fp32"
        )
    # What is gathered may be rounded to the compute dtype.
    reshard(model)
    (parameter,) = model.get_submodule(model.names.final_norm).parameters()
    gain = full_tensor(parameter)
    rotation = None
    if context.is_main:
        rotation = principal_rotation(total, gain, tied=model.config.tie_embeddings).cpu()
    found: Tensor = context.broadcast(rotation)
    return found


def principal_rotation(covariance: Tensor, final_gain: Tensor, *, tied: bool) -> Tensor:
    """Orthogonal Q [d, d] fp64 whose columns are principal components, the strongest first.

    With tied embeddings the final norm's gain cannot move into the head without changing the
    embedding, and only a uniform gain is the same in every basis. So dimensions whose gain is
    farther than GAIN_TOLERANCE from the median stay as they are, and the others rotate among
    themselves.

    Args:
        covariance: [d, d] fp64 sum of outer products of the stream.
        final_gain: [d] gain of the final norm.
        tied: whether the head's weight is the embedding's.
    """
    gain = final_gain.to(covariance)
    median = gain.median()
    rotated = (gain - median).abs() <= GAIN_TOLERANCE * median.abs()
    if not tied:
        rotated = torch.ones_like(rotated)
    rotation = torch.diag((~rotated).to(covariance.dtype))
    chosen = torch.nonzero(rotated).flatten()
    vectors = torch.linalg.eigh(covariance[chosen][:, chosen]).eigenvectors
    # eigh leaves signs open; the same everywhere, whatever computed them.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    rotation[chosen[:, None], chosen] = vectors * largest.sign()
    strength = torch.einsum("ij,ik,kj->j", rotation, covariance, rotation)
    return rotation[:, strength.argsort(descending=True)]


@torch.no_grad()
def rotate(model: CausalLM, rotation: Tensor) -> None:
    """Rotates the residual stream of a loaded source by an orthogonal `rotation` [d, d] fp64, in
    place; collective.

    The gains of each norm move into the matrices behind it, up to their root mean square: with that
    taken out as well, an optimizer's steps would be of another size relative to the weights. The
    function stays the same up to rounding; with tied embeddings, up to the differences of the final
    gain among the dimensions that were rotated together.
    """
    reshard(model)
    rotation = rotation.to(next(model.parameters()).device)
    for block in model.blocks:
        attention, feed_forward = _norms(model, block)
        _rotate_norm(attention, _with_roles(model, block, Role.QUERIES, Role.KEYS), rotation)
        _rotate_norm(feed_forward, _with_roles(model, block, Role.CHANNELS), rotation)
        for module in _with_roles(model, block, Role.ATTENTION_OUTPUT, Role.FEED_FORWARD_OUTPUT):
            for parameter in module.parameters():
                full = full_tensor(parameter).double()
                own, region = local_region(parameter)
                own.copy_(rotation[:, region[0]].t() @ full)
    names = model.names
    final = model.get_submodule(names.final_norm)
    if model.config.tie_embeddings:
        (gain,) = final.parameters()
        _assign(gain, torch.einsum("ij,i,ij->j", rotation, full_tensor(gain).double(), rotation))
    else:
        _rotate_norm(final, [model.get_submodule(names.head)], rotation)
    (embedding,) = model.get_submodule(names.embedding).parameters()
    _multiply(embedding, rotation)


def _norms(model: CausalLM, block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The norms in front of a block's attention and feed-forward layer."""
    attention, feed_forward = _with_roles(model, block, Role.NORM)
    return attention, feed_forward


def _with_roles(model: CausalLM, block: nn.Module, *roles: Role) -> list[nn.Module]:
    names = [name for name, role in model.names.modules.items() if role in roles]
    return [block.get_submodule(name) for name in names]


def _rotate_norm(norm: nn.Module, readers: list[nn.Module], rotation: Tensor) -> None:
    """Moves the norm's gain into the weights of its readers and rotates these."""
    (gain,) = norm.parameters()
    values = full_tensor(gain).double()
    size = values.square().mean().sqrt()
    # Zeros stay in the weights: a gain of 0 in front of weights of 0 could never be trained again.
    size = torch.where(size > 0, size, 1.0)
    factor = (values / size)[:, None] * rotation
    for reader in readers:
        weight = reader.weight
        assert isinstance(weight, Tensor)
        _multiply(weight, factor)
    _assign(gain, size.expand(values.shape))


def _multiply(weight: Tensor, factor: Tensor) -> None:
    """weight [n, d] @ factor [d, d], row by row: no rank needs another's."""
    own, _ = local_region(weight)
    own.copy_(own.double() @ factor)


def _assign(parameter: Tensor, values: Tensor) -> None:
    """Copies this rank's rows of the whole `values`."""
    own, region = local_region(parameter)
    own.copy_(values[region])
