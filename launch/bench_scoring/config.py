"""Options of launch.bench_scoring."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.errors import require_at_least, require_threads
from data.options import ON_DISK
from trainer.models.limits import require_even_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchScoringConfig:
    """Time the scoring of all blocks by perplexity against a loop that runs the model once for
    each."""

    ESSENTIAL: ClassVar = (
        "source hidden layers heads ffn vocabulary sequences seq-len precision repeats json"
    )

    source: Annotated[str | None, ON_DISK] = None
    """Model to score, a Hugging Face folder, .gguf file or hub id, on random tokens. Default: one
    of random weights, of the sizes below, whose blocks and head have LLaMA-2-7B's proportion."""
    hidden: int = 512
    """Width of the random model."""
    layers: int = 32
    """Its blocks."""
    heads: int = 8
    """Its heads."""
    ffn: int = 1376
    """Its feed-forward channels."""
    vocabulary: int = 4096
    """Rows of its embedding and head."""
    sequences: int = 2
    """Sequences to score on."""
    seq_len: int = 256
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    repeats: int = 3
    """Rounds in which both take turns, after one that is not counted."""
    json: Annotated[str | None, ON_DISK] = None
    """Write the result to this file."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "hidden", "heads", "ffn", "vocabulary", "sequences", "repeats")
        require_at_least(self, 2, "layers", why=" (one to leave out and one that is left)")
        require_at_least(self, 2, "seq_len", why=" (a token and its successor)")
        require_threads(self.threads)
        require_even_heads(self.hidden, self.heads)

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        sizes = ("hidden", "layers", "heads", "ffn", "vocabulary")
        return dict.fromkeys(sizes, "--source names the model") if self.source else {}
