"""Time of a shearing step against the dense source's and against the target's own training step.

All kinds of steps are taken in turns in one process by the real trainer on random tokens; ratios
are medians over neighbouring pairs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import cli
from data.errors import InputError

EXAMPLES = """
python -m launch.bench_shear --json shear-timing.json
python -m launch.bench_shear --precision bf16 --seq-len 1024 --repeats 15
python -m launch.bench_shear --hidden 2048 --layers 24 --heads 16 --ffn 5504 --vocabulary 32000 \\
    --target 370m --precision bf16 --batch 2 --seq-len 4096
    on a GPU of 80 GB, of which weights, gradients and Adam's moments of both models take 28 GB
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time a shearing step at several sparsities against the source's and the target's own step.

    "compact, 50% of the way": on as many units as lie halfway from the source's to the target's.
    """

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
    """Sequences per pass; None: all."""
    seq_len: int = 512
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision."""
    threads: int | None = None
    """CPU threads; None: all cores."""
    repeats: int = 9
    """Steps of each kind, after one that is not counted."""
    json: str | None = None
    """Write the result to this file."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(("hidden", "layers", "heads", "ffn", "vocabulary", "batch"), 1)
        least |= {"micro_batch": 1, "seq_len": 2, "threads": 1, "repeats": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least {limit}")
        if self.hidden % self.heads:
            raise InputError(f"--hidden {self.hidden} is not a multiple of --heads {self.heads}")


def main() -> None:
    config = cli.parse(BenchConfig, section="bench_shear", examples=EXAMPLES)
    from launch.shear_timing import run

    run(config)


if __name__ == "__main__":
    cli.run(main)
