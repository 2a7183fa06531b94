"""AdamW over sharded parameters, and gradient clipping by the global norm."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainer.config import TrainConfig
from trainer.parallel import to_local


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(model: nn.Module, limit: float, mesh: DeviceMesh) -> torch.Tensor:
    """Scales gradients so that their global norm is at most `limit` (0: no limit); returns the norm
    before (0-d fp32).

    Works on local shards: one fused norm per rank and one scalar all-reduce over the ranks that
    hold different shards (replicas of HSDP hold equal ones). A non-finite norm leaves non-finite
    gradients.
    """
    gradients = [to_local(p.grad) for p in model.parameters() if p.grad is not None]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if gradients:
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    else:
        squares = torch.zeros((), device=mesh.device_type)
    group = mesh.get_group("shard")
    if group.size() > 1:
        dist.all_reduce(squares, group=group)
    norm = squares.sqrt()
    if limit > 0 and gradients:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
