"""AdamW over sharded parameters."""

from typing import Any

import torch

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
