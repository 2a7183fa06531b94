"""Continued pre-training: `torchrun --nproc_per_node 8 launch/cpt.py`, or under plain python."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import STOPPED, parse, run
from trainer.config import CptConfig
from trainer.stopping import kept_is_said

EXAMPLES = """
torchrun --nproc_per_node 8 launch/cpt.py
    the sheared model of runs/shear on runs/tokens, at the defaults above
torchrun --nproc_per_node 8 launch/cpt.py --replicas 2 --lr 3e-5
python launch/cpt.py --seq-len 256 --global-batch 8 --micro-batch 8 --steps 32
torchrun --nproc_per_node 8 launch/cpt.py --init random --output runs/fresh
torchrun --nproc_per_node 8 launch/cpt.py --teacher models/Llama-2-7b-hf
"""


def main(argv: list[str] | None = None) -> None:
    config = parse(CptConfig, section="cpt", argv=argv, examples=EXAMPLES)
    with kept_is_said(Path(config.output) / "cpt.json"):
        from trainer.cpt import continue_pretraining
        from trainer.memory import explain_out_of_memory

        with explain_out_of_memory(config.train):
            trainer = continue_pretraining(config)
    if trainer is not None and trainer.stopping:
        sys.exit(STOPPED)


if __name__ == "__main__":
    run(main)
