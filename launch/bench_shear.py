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
python -m launch.bench_shear --hidden 4096 --layers 32 --heads 32 --ffn 11008 --vocabulary 32000 \\
    --target 1.3b --precision bf16 --batch 2 --seq-len 4096
    on a GPU
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Time a shearing step at several sparsities against the source's and the target's own step."""

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
        if self.hidden % self.heads:
            raise InputError(f"--hidden {self.hidden} is not a multiple of --heads {self.heads}")
        for name in ("repeats", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")


def main() -> None:
    config = cli.parse(BenchConfig, section="bench_shear", examples=EXAMPLES)
    from launch.shear_timing import measure, print_result
    from trainer.files import write_report

    result = measure(config)
    print_result(result)
    if config.json is not None:
        write_report(Path(config.json), result)


if __name__ == "__main__":
    cli.run(main)
