"""Continued pre-training: `torchrun --nproc_per_node 8 launch/cpt.py`, or under plain python."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import parse, run
from data.mixture import MixtureConfig
from trainer.config import DistillationConfig, TrainConfig

EXAMPLES = """
torchrun --nproc_per_node 8 launch/cpt.py
    the sheared model of runs/shear on runs/tokens, at the defaults above
torchrun --nproc_per_node 8 launch/cpt.py --replicas 2 --lr 3e-5
python launch/cpt.py --seq-len 256 --global-batch 8 --micro-batch 8 --steps 32
torchrun --nproc_per_node 8 launch/cpt.py --init random --output runs/fresh
torchrun --nproc_per_node 8 launch/cpt.py --teacher models/Llama-2-7b-hf
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CptConfig:
    """Train a sheared (or any Llama-family) model further; running it again resumes --output."""

    ESSENTIAL: ClassVar = (
        "model data output init steps seq-len global-batch micro-batch lr mixture seed json"
    )

    model: str = "runs/shear"
    """Folder of a shearing run, a Hugging Face folder, a .gguf file or a hub id."""
    data: str = "runs/tokens"
    """Folder made by data.tokenize."""
    output: str = "runs/cpt"
    """Folder of this run: model/, cpt.json, metrics.jsonl, checkpoints/."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: fresh weights of the same shape, as a baseline."""
    domain_weights: str | None = None
    """Initial weights, "c4=0.6,github=0.4". None: the shearing run's last ones, else proportional
    to tokens."""
    reference_losses: str | None = None
    """Losses to steer towards, "c4=2.1,github=0.9". None: the shearing run's reference, else the
    model's own at the start."""
    reference_fit: str | None = None
    """JSON file {"sizes": {"6738415616": {"c4": 1.92, ...}, ...}} of held-out losses by number of
    parameters, from which the losses to steer towards are fitted at the model's number."""
    teacher: str | None = None
    """Model to learn from besides the text, named like --model; same vocabulary. None: for a
    sheared model the source, at shearing's --distill-weight; else none."""
    json: str | None = None
    """Copy the final report to this file."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def main(argv: list[str] | None = None) -> None:
    config = parse(CptConfig, section="cpt", argv=argv, examples=EXAMPLES)
    from trainer.cpt import continue_pretraining

    continue_pretraining(
        config.train,
        model=config.model,
        data=config.data,
        output=Path(config.output),
        init=config.init,
        mixture=config.mixture,
        domain_weights=config.domain_weights,
        reference_losses=config.reference_losses,
        reference_fit=config.reference_fit,
        teacher=config.teacher,
        distillation=config.distillation,
        json_copy=Path(config.json) if config.json else None,
    )


if __name__ == "__main__":
    run(main)
