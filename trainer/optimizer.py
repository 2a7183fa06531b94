"""AdamW over sharded parameters, and gradient clipping by the global norm."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainer.config import TrainConfig
from trainer.parallel import to_local


class LocalAdamW(torch.optim.AdamW):
    """torch.optim.AdamW that updates this rank's shards as plain tensors.

    AdamW knows no neighbours: a shard's update is that of the whole tensor, bit for bit. Given
    DTensors, PyTorch works out the sharding of every argument in every step, which costs the host
    more than the update itself, and up to version 2.12 never frees what it worked out. State is
    kept as torch.optim.AdamW keeps it, in DTensors for DTensors.
    """

    def _init_group(
        self, group: dict[str, Any], parameters: list[torch.Tensor], *lists: list[torch.Tensor]
    ) -> bool:
        """Fills the lists of what `step` updates: parameters, gradients, moments, step counts."""
        is_complex: bool = super()._init_group(group, parameters, *lists)
        for tensors in (parameters, *lists):
            tensors[:] = [to_local(tensor) for tensor in tensors]
        return is_complex


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return LocalAdamW(
        # Of a frozen model nothing is left; the optimizer wants a group all the same.
        [group for group in groups if group["params"]] or groups[:1],
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
