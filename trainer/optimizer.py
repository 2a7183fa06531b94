"""The optimizer of a run, and gradient clipping by the global norm."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainer.adamw import LocalAdamW
from trainer.config import TrainConfig
from trainer.models.decoder import CausalLM
from trainer.models.families import Role
from trainer.muon import Muon
from trainer.parallel import compute_dtype, to_local


def build_optimizer(model: CausalLM, config: TrainConfig) -> LocalAdamW:
    """Fused AdamW, or Muon for the matrices in blocks and AdamW for the rest; weight decay on
    matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_muon = _muon_groups(model, config.momentum) if config.momentum is not None else []
    taken = {p for group in by_muon for p in group["params"]}
    groups = [
        *(group | {"weight_decay": config.weight_decay} for group in by_muon),
        {
            "params": [p for p in parameters if p.ndim >= 2 and p not in taken],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Of a frozen model nothing is left; the optimizer wants a group all the same.
    groups = [group for group in groups if group["params"]] or groups[-1:]
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": True,
    }
    if not by_muon:
        return LocalAdamW(groups, **options)
    device = next(model.parameters()).device
    return Muon(groups, dtype=compute_dtype(config.precision, device), **options)


def _muon_groups(model: CausalLM, momentum: float) -> list[dict[str, Any]]:
    """The matrices in blocks that are trained, those of fused queries, keys and values apart."""
    roles = model.config.traits.names.modules
    groups = {0: list[nn.Parameter](), model.config.head_dim: list[nn.Parameter]()}
    for block in model.blocks:
        for name, parameter in block.named_parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                fused = roles[name.removesuffix(".weight")] is Role.FUSED
                groups[model.config.head_dim if fused else 0].append(parameter)
    return [
        {"params": matrices, "momentum": momentum, "head_rows": head_rows}
        for head_rows, matrices in groups.items()
    ]


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
