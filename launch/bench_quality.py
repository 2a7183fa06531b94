"""Held-out loss of a sheared model at a fixed budget of tokens: one row of the quality table.

The default protocol gives each domain its own documents for training and for measuring, in the
order of the input: 82k tokens in all, divided between shearing and continued pre-training.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import cli

EXAMPLES = """
python -m launch.bench_quality --source models/SmolLM2-135M --input 'SlimPajama/train/**/*.zst'
python -m launch.bench_quality --source runs/demo/source --input 'text/*.zst' --seed 1 \\
    --output runs/quality-1 --json quality.json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """Shear, continue pre-training and measure at a fixed number of tokens. Resumable."""

    source: str
    """Model to prune: a Hugging Face folder or hub id."""
    input: tuple[str, ...]
    """Documents with domains, as for data.tokenize."""
    output: str = "runs/quality"
    """Folder of everything this makes."""
    target: str = "layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152"
    """Shape to prune to."""
    domain_weights: str = "c4=0.6,stackexchange=0.25,github=0.15"
    """Domains and their share of the training tokens; documents of others are left out."""
    held_out_documents: int = 60
    """First documents of each domain, kept for measuring."""
    train_documents: int = 340
    """Documents of each domain after those, for training."""
    sequences: int = 24
    """Held-out sequences measured per domain."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch: int = 8
    """Sequences per step."""
    shear_steps: int = 16
    """Steps of mask learning."""
    cpt_steps: int = 24
    """Steps of continued pre-training."""
    shear_lr: float = 3e-4
    """Peak learning rate while shearing."""
    cpt_lr: float = 6e-4
    """Peak learning rate of continued pre-training."""
    mixture: str = "fixed"
    """fixed keeps the domain weights; dynamic follows excess loss."""
    precision: str = "bf16"
    """Compute precision."""
    seed: int = 0
    """Seed of data order and masks."""
    shear_flags: str = ""
    """Further flags of pruner.shear, "--mask-lr 0.1 --mask-noise 0"."""
    json: str | None = None
    """Write the result to this file."""


def main() -> None:
    config = cli.parse(QualityConfig, section="bench_quality", examples=EXAMPLES)
    from launch.quality import measure

    print(json.dumps(measure(config), indent=1))


if __name__ == "__main__":
    cli.run(main)
