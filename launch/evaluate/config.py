"""Options of launch.evaluate."""

from dataclasses import dataclass
from typing import Literal

from data.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Measure a model on held-out tokens, on a text file, or on both."""

    model: str = "runs/cpt"
    """Model folder, a run's output folder, a .gguf file or a hub id."""
    data: str | None = None
    """Token folder made by `python -m data.tokenize`."""
    split: Literal["held_out", "train"] = "held_out"
    """Part of the token folder to measure on."""
    sequences: int = 64
    """Sequences per domain, the first ones of its split; fewer where a domain holds fewer."""
    seq_len: int = 4096
    """Tokens per sequence."""
    text: str | None = None
    """UTF-8 text file, scored as one document."""
    window: int = 2048
    """Positions the model sees at once in --text, a BOS token included."""
    stride: int | None = None
    """Tokens between window starts in --text. None: windows do not overlap."""
    bos: Literal["auto", "no", "yes", "every"] = "auto"
    """BOS in --text. yes: before the document; every: before each window; auto: the tokenizer's."""
    batch: int = 8
    """Sequences or windows per rank in one forward pass."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision. auto: bf16 on a GPU, fp32 on a CPU."""
    kernels: Literal["auto", "reference", "triton", "cuda"] = "auto"
    """What computes the operators, as in training."""
    threads: int | None = None
    """CPU threads per rank. None: cores of the machine divided by its ranks."""
    json: str | None = None
    """File for the same results as JSON."""

    def __post_init__(self) -> None:
        if self.data is None and self.text is None:
            raise InputError("nothing to measure: give --data TOKENS, --text FILE, or both")
        for name in ("sequences", "seq_len", "window", "batch"):
            if getattr(self, name) < (2 if name in ("seq_len", "window") else 1):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {getattr(self, name)}: too small to predict a token")
