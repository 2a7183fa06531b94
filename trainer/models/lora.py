"""Low-rank adapters beside the matrices in blocks (LoRA, arXiv 2106.09685).

A matrix W keeps its place and its Hugging Face name; the factors A and B of its adapter are two
more parameters of the same layer. So what reads and writes weights by name finds them as ever.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.families import Role
from trainer.models.folding import Fold
from trainer.models.layers import Linear
from trainer.parallel import local_region

_NO_MATRIX = (Role.NORM, Role.HEAD_NORM)


class Dropout:
    """Which inputs of the adapters a training step leaves out.

    A pure function of the seed, the step, the place of the sequence in the global batch and the
    adapter: the same on any number of ranks and micro-batches, after a resume, and where a block is
    computed again in the backward pass.
    """

    def __init__(self, rate: float, seed: int) -> None:
        assert 0 <= rate < 1
        self.rate = rate
        self.seed = seed
        self.place: tuple[int, int] | None = None
        """The step, and the number of the first sequence in the global batch; None outside of
        training steps, where all inputs stay."""

    def __call__(self, x: Tensor, adapter: int) -> Tensor:
        """x [B, S, m] -> [B, S, m], scaled so that the expected values stay."""
        if self.place is None or not self.rate:
            return x
        step, first = self.place
        kept = torch.empty_like(x, requires_grad=False)
        generator = torch.Generator(device=x.device)
        for row, values in enumerate(kept):
            key = f"{self.seed} {step} {first + row} {adapter}".encode()
            digest = hashlib.blake2b(key, digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            values.bernoulli_(1 - self.rate, generator=generator)
        return x * kept.div_(1 - self.rate)


class LoraLinear(Linear):
    """A frozen Linear and its adapter: y = W x + b + scale * B A dropout(x)."""

    def __init__(
        self, replaced: Linear, *, rank: int, scale: float, dropout: Dropout, number: int
    ) -> None:
        super().__init__(replaced.in_features, replaced.out_features, replaced.bias is not None)
        self.lora_a = nn.Parameter(torch.empty(rank, replaced.in_features))
        self.lora_b = nn.Parameter(torch.empty(replaced.out_features, rank))
        self.scale = scale
        self.dropout = dropout
        self.number = number
        """Of the adapter in its model."""

    def forward(self, x: Tensor, fold: Fold | None = None) -> Tensor:
        """x [..., m] -> [..., n]; adapters know no masks, so `fold` selects everything."""
        assert fold is None or fold.trivial, "masks cannot be folded into adapters"
        update = F.linear(F.linear(self.dropout(x, self.number), self.lora_a), self.lora_b)
        return torch.add(F.linear(x, self.weight, self.bias), update, alpha=self.scale)


def targets_of(config: ModelConfig, wanted: Sequence[str]) -> tuple[str, ...]:
    """Modules that get an adapter, by the last part of their names: those `wanted`, or all matrices
    in blocks. Raises InputError where the model has no such module."""
    inner = config.traits.names.modules
    known = {name.rpartition(".")[2]: name for name, r in inner.items() if r not in _NO_MATRIX}
    assert len(known) == sum(role not in _NO_MATRIX for role in inner.values())
    for target in wanted:
        if target not in known:
            raise InputError(
                f"--target-modules {target}: the blocks of a {config.family} model have no such "
                f"matrix; they have {', '.join(known)}"
            )
    chosen = tuple(name for name in known if not wanted or name in wanted)
    attends = any(sizes.num_heads for sizes in config.blocks)
    feeds = any(sizes.intermediate_size for sizes in config.blocks)
    present = {n for n in chosen if (attends if config.traits.names.attends(known[n]) else feeds)}
    if not present:
        raise InputError(
            f"--target-modules {' '.join(chosen)}: no block of this model has one of them, because "
            "their layers were removed; name others"
        )
    return chosen


def add_adapters(
    model: CausalLM, targets: Sequence[str], *, rank: int, scale: float, dropout: Dropout
) -> None:
    """Gives the matrices `targets` of every block an adapter, and freezes all other weights.

    New parameters are made on the current default device, without values (`init_adapters`).
    """
    model.requires_grad_(False)
    number = 0
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            path, _, own = name.rpartition(".")
            if own in targets and isinstance(module, Linear):
                adapted = LoraLinear(module, rank=rank, scale=scale, dropout=dropout, number=number)
                adapted.weight, adapted.bias = module.weight, module.bias
                block.get_submodule(path).register_module(own, adapted)
                number += 1
    assert number, "no module was a target"


def adapters_of(model: CausalLM) -> Iterator[tuple[str, LoraLinear]]:
    """(name, layer) of every adapted layer, first to last."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@torch.no_grad()
def init_adapters(model: CausalLM, seed: int) -> None:
    """Draws A uniformly, as torch.nn.Linear draws its weights and peft its A, and sets B to 0: an
    adapted model begins as the model itself.

    Each A has its own generator, and every rank keeps its part of the whole draw: the result does
    not depend on sharding or device.
    """
    for _, layer in adapters_of(model):
        local, region = local_region(layer.lora_a)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + layer.number) % 2**63)
        bound = layer.in_features**-0.5
        whole = torch.empty(layer.lora_a.shape).uniform_(-bound, bound, generator=generator)
        local.copy_(whole[region])
        local_region(layer.lora_b)[0].zero_()


def plain_view(model: CausalLM) -> CausalLM:
    """The model without its adapters, which shares its weights with `model`: for what reads and
    names weights, not to be called."""
    own = dict(model.named_parameters())
    with torch.device("meta"):
        view = CausalLM(model.config)
    for name, _ in list(view.named_parameters()):
        path, _, last = name.rpartition(".")
        view.get_submodule(path).register_parameter(last, own[name])
    return view


def train_last_blocks(model: CausalLM, number: int, *, head: bool) -> None:
    """Freezes all but the last `number` blocks, the final norm and, if asked for, the head (which
    is the embedding where the two are tied)."""
    model.requires_grad_(False)
    names = model.names
    trained = [*model.blocks[-number:], model.get_submodule(names.final_norm)]
    if head:
        tied = model.config.tie_embeddings
        trained.append(model.get_submodule(names.embedding if tied else names.head))
    for module in trained:
        module.requires_grad_(True)
