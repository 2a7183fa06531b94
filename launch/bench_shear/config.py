"""Options of launch.bench_shear."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.errors import require_at_least, require_threads
from data.options import ON_DISK
from trainer.models.limits import require_even_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchShearConfig:
    """Time a shearing step at several sparsities against the source's and the target's own step.

    "compact, 50% of the way": on as many units as lie halfway from the source's to the target's.
    """

    ESSENTIAL: ClassVar = "hidden layers heads ffn target batch seq-len precision repeats json"

    hidden: int = 512
    """Width of the source."""
    layers: int = 12
    """Blocks of the source."""
    heads: int = 8
    """Heads of the source."""
    ffn: int = 1408
    """Feed-forward channels of the source."""
    vocabulary: int = 8192
    """Rows of embedding and head."""
    target: str = "layers=9,hidden=256,heads=4,ffn=704"
    """Shape to prune to."""
    batch: int = 4
    """Sequences per step."""
    micro_batch: int | None = None
    """Sequences per pass. Default: all."""
    seq_len: int = 512
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    repeats: int = 9
    """Steps of each kind, after one that is not counted."""
    json: Annotated[str | None, ON_DISK] = None
    """Write the result to this file."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "hidden", "layers", "heads", "ffn", "vocabulary", "batch")
        require_at_least(self, 1, "micro_batch", "repeats")
        require_threads(self.threads)
        require_at_least(self, 2, "seq_len")
        require_even_heads(self.hidden, self.heads)
