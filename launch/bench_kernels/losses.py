"""The two ways to a loss that `--cpu` compares: all logits stored, and one chunk at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainer.kernels.linear_cross_entropy import linear_cross_entropy

LossInputs = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def loss_inputs(vocabulary: int, tokens: int, hidden: int) -> LossInputs:
    """Hidden states [T, d] and head [V, d], which want gradients; targets and weights [T]."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=generator).mul_(hidden**-0.5)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return states, weight.requires_grad_(), targets, torch.full((tokens,), 1 / tokens)


def full_loss(states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> None:
    """Cross-entropy of stored logits [T, V], forward and backward."""
    losses = functional.cross_entropy(states @ weight.t(), targets, reduction="none")
    torch.dot(losses, token_weights).backward()


def fused_loss(states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> None:
    """trainer.kernels.linear_cross_entropy.linear_cross_entropy, forward and backward."""
    linear_cross_entropy(states, weight, targets, token_weights)[0].backward()


LOSSES: dict[str, Loss] = {"full": full_loss, "fused": fused_loss}
