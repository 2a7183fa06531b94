"""Recovery and tuning: `torchrun --nproc_per_node 8 launch/finetune.py`, or under plain python."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.cli import STOPPED, parse, run
from trainer.finetune_config import FinetuneConfig
from trainer.stopping import kept_is_said

EXAMPLES = """
torchrun --nproc_per_node 8 launch/finetune.py
    adapters for the sheared model of runs/shear, two epochs of runs/tokens
torchrun --nproc_per_node 8 launch/finetune.py --model runs/cpt --data runs/alpaca --epochs 3
python launch/finetune.py --method last-blocks --last-blocks 3 --steps 500 --lr 5e-5
python launch/finetune.py --lora-r 16 --lora-alpha 32 --target-modules q_proj v_proj
torchrun --nproc_per_node 8 launch/finetune.py --teacher models/Llama-2-7b-hf
"""


def main(argv: list[str] | None = None) -> None:
    config = parse(FinetuneConfig, section="finetune", argv=argv, examples=EXAMPLES)
    with kept_is_said(Path(config.output) / "finetune.json"):
        from trainer.finetune import finetune
        from trainer.memory import explain_out_of_memory

        with explain_out_of_memory(config.train):
            trainer = finetune(config)
    if trainer is not None and trainer.stopping:
        sys.exit(STOPPED)


if __name__ == "__main__":
    run(main)
