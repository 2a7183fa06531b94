"""Options of launch.latency."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from data.errors import InputError, require, require_at_least, require_threads
from data.options import ON_DISK, Positional


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConfig:
    """Time how models generate: first token, every further one, tokens per second, memory."""

    ESSENTIAL: ClassVar = "models batch input-tokens new-tokens quality plot json"

    models: Annotated[tuple[str, ...], Positional("MODEL ..."), ON_DISK] = ("runs/cpt",)
    """Model folders, output folders of runs or hub ids. Several take turns in one process, so that
    what else the machine does meets all alike; the first is what the others are compared with."""
    batch: tuple[int, ...] = (1,)
    """Sequences that are generated at once; several sizes are measured one after the other."""
    input_tokens: int = 12
    """Tokens of the prompt."""
    new_tokens: int = 128
    """Tokens generated behind it, whatever they are: none ends a sequence."""
    rounds: int = 5
    """Turns of each model that count."""
    warm_up: int = 1
    """Turns of each model before them."""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """Type of weights and computation. auto: bf16 on a GPU, fp32 on a CPU."""
    memory: bool = True
    """Measure the peak of memory too, once for every model and batch, in a process of its own."""
    quality: Annotated[str | None, ON_DISK] = None
    """JSON file of `shorn evaluate --json` on the same models: their losses are shown beside."""
    plot: Annotated[str | None, ON_DISK] = None
    """PNG file for a picture of the loss over the time per token (with --quality)."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    json: Annotated[str | None, ON_DISK] = None
    """File for the results as JSON."""

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError("no model named; give the folder of one, such as runs/cpt")
        if not self.batch:
            raise InputError("--batch names no number; use for example --batch 1 16")
        require(min(self.batch) >= 1, "batch", min(self.batch), "at least 1")
        require_at_least(self, 1, "input_tokens", "rounds")
        require_at_least(self, 2, "new_tokens", why=" (the first token is timed apart)")
        require_at_least(self, 0, "warm_up")
        require_threads(self.threads)
        if self.plot is not None and self.quality is None:
            raise InputError(
                f"--plot {self.plot}: shows losses over times; give --quality with the file that "
                "`shorn evaluate --json` wrote of these models"
            )
