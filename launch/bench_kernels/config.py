"""Options of launch.bench_kernels."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from data.errors import InputError, require, require_at_least, require_threads
from data.options import ON_DISK

KNOWN_ARCHS = (80, 90, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchKernelsConfig:
    """Time every operator on a GPU; or report on kernels without one."""

    ESSENTIAL: ClassVar = "static cpu archs csv json"

    static: bool = False
    """Compile every kernel ahead of time and report registers, widths, traffic, predicted time."""
    cpu: bool = False
    """Time linear cross-entropy, gather-scale and documents apart on this CPU."""
    archs: tuple[int, ...] = KNOWN_ARCHS
    """--static: compute capabilities, of 80 (A100), 90 (H100) and 100 (B200)."""
    vocabularies: tuple[int, ...] = (32000, 49152, 128256)
    """--cpu: rows of the head."""
    tokens: int = 4096
    """--cpu: tokens of the loss."""
    hidden: int = 512
    """--cpu: width of the head."""
    repeats: int = 7
    """--cpu: measurements of each kind, after one that is not counted."""
    threads: int = 1
    """--cpu: CPU threads."""
    budget_seconds: float = 470.0
    """On a GPU: time for everything; what is left then is skipped."""
    csv: Annotated[str | None, ON_DISK] = None
    """On a GPU: write the timings to this file."""
    json: Annotated[str | None, ON_DISK] = None
    """Write the result to this file."""

    def __post_init__(self) -> None:
        if self.static and self.cpu:
            raise InputError("choose what to report: either --static or --cpu, or neither on a GPU")
        for name, values in (("archs", self.archs), ("vocabularies", self.vocabularies)):
            if not values:
                raise InputError(f"--{name} needs at least one value")
        for arch in self.archs:
            if arch not in KNOWN_ARCHS:
                raise InputError(f"--archs {arch} is not one of {', '.join(map(str, KNOWN_ARCHS))}")
        require_at_least(self, 1, "vocabularies", "tokens", "hidden", "repeats")
        require_threads(self.threads)
        require(self.budget_seconds > 0, "budget_seconds", self.budget_seconds, "above 0")

    def idle(self) -> dict[str, str]:
        """Options that have no effect beside the others, and why (data.idle)."""
        found = {}
        if not self.static:
            found["archs"] = "only --static compiles for architectures"
        if not self.cpu:
            names = ("vocabularies", "tokens", "hidden", "repeats", "threads")
            found |= dict.fromkeys(names, "only --cpu measures with it")
        if self.static or self.cpu:
            found |= dict.fromkeys(("budget_seconds", "csv"), "nothing is timed on a GPU")
        return found
