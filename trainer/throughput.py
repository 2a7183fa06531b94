"""Tokens per second over real time, and model FLOPs utilisation (MFU) in both conventions."""

import time
from collections.abc import Callable
from typing import Any

import torch

from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM

PEAK_BF16_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 peak per second of SXM parts, by the name the driver reports."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU, or None for a device the table does not know (PCIe and NVL parts
    are slower)."""
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)


def partial_flops(model: CausalLM, seq_len: int, causal: bool) -> float:
    """FLOPs of one token in a training step of `model`, of which not all is trained; all of it
    costs `ModelConfig.flops_per_token`.

    A frozen matrix needs no product for its gradient, a third of its FLOPs. Blocks in front of all
    that is trained need no backward pass. Adapters are matrices too.
    """
    config, blocks = model.config, model.blocks
    flops = config.flops_per_token(seq_len, causal)
    first = 0
    if not any(p.requires_grad for p in model.get_submodule(model.names.embedding).parameters()):
        trained = [any(p.requires_grad for p in block.parameters()) for block in blocks]
        first = trained.index(True) if True in trained else len(blocks)
    for index, (block, sizes) in enumerate(zip(blocks, config.blocks, strict=True)):
        matrices = {name: p for name, p in block.named_parameters() if p.ndim == 2}
        added = sum(p.numel() for name, p in matrices.items() if not name.endswith(".weight"))
        frozen = sum(p.numel() for p in matrices.values() if not p.requires_grad)
        flops += 6 * added - 2 * frozen
        if index < first:
            attention = (6 if causal else 12) * sizes.num_heads * config.head_dim * seq_len
            flops -= 2 * frozen + 2 / 3 * attention
    head = model.head_weight
    return flops - (0 if head.requires_grad else 2 * head.numel())


class Throughput:
    """Clock of a training run: time inside optimizer steps and wall time, and the tokens trained in
    them."""

    def __init__(
        self, config: ModelConfig, *, seq_len: int, device: torch.device, world: int
    ) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name)
        self._world = world
        self._flops = {
            "mfu_full": config.flops_per_token(seq_len, causal=False),
            "mfu_causal": config.flops_per_token(seq_len, causal=True),
        }
        self.tokens = 0
        self.train_seconds = 0.0
        self._wall_before = 0.0
        self._started = time.perf_counter()
        self._step_started = self._started
        self._rate = 0.0

    def recount(self, flops: Callable[[bool], float]) -> None:
        """Takes the FLOPs of a token from `flops(causal)`, where a step does not compute the whole
        model; not called while MFU is unknown."""
        if self._peak is not None:
            self._flops = {"mfu_full": flops(False), "mfu_causal": flops(True)}

    def start_step(self) -> None:
        self._step_started = time.perf_counter()

    def end_step(self, tokens: int) -> float:
        """Counts a step of `tokens` tokens over all ranks; returns its tokens per second."""
        seconds = time.perf_counter() - self._step_started
        self.train_seconds += seconds
        self.tokens += tokens
        self._rate = tokens / seconds
        return self._rate

    def mfu(self) -> dict[str, float]:
        """MFU of the last step: `mfu_full` counts 6N + 12Lds FLOPs a token, `mfu_causal` 6N + 6Lds;
        empty if unknown."""
        if self._peak is None:
            return {}
        return {
            key: self._rate * flops / (self._peak * self._world)
            for key, flops in self._flops.items()
        }

    @property
    def wall_seconds(self) -> float:
        """Time since the run began, earlier processes of a resumed run included."""
        return self._wall_before + time.perf_counter() - self._started

    def summary(self) -> dict[str, float]:
        """Tokens per second inside steps (mask updates included), and over wall time with
        evaluation and checkpoints."""
        return {
            "tokens_per_second": self.tokens / self.train_seconds if self.train_seconds else 0.0,
            "wall_tokens_per_second": self.tokens / self.wall_seconds,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "train_seconds": self.train_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens = state["tokens"]
        self.train_seconds = state["train_seconds"]
        self._wall_before = state["wall_seconds"]
        self._started = time.perf_counter()
