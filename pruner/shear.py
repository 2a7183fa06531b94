"""`python -m pruner.shear`: learned masks, then a dense Hugging Face model of the target shape.

Runs alone or under torchrun (`torchrun --nproc_per_node 8 -m pruner.shear ...`).
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, as by torchrun
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry) != _HERE)]

from data.cli import STOPPED, parse, run
from pruner.config import ShearConfig
from trainer.stopping import kept_is_said

EXAMPLES = """
torchrun --nproc_per_node 8 -m pruner.shear --target 1.3b
    LLaMA-2-7B to 1.3B on the data of runs/tokens, at the defaults above
python -m pruner.shear --source models/SmolLM2-135M --output runs/small \\
    --target layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152 \\
    --steps 20 --seq-len 256 --global-batch 8 --micro-batch 8 --lr 3e-4
python -m pruner.shear --target ffn=8192 --output runs/narrow
    only the feed-forward channels are pruned
python -m pruner.shear --target speedup=2 --output runs/fast
    a shape that decodes twice as fast as the source on this device
python -m pruner.shear --target params=1.3b --output runs/budget
    a shape of at most 1.3 billion parameters
python -m pruner.shear --target 1.3b --rule sheared-llama --output runs/rule
python -m pruner.shear --target layers=24 --steps 0 --output runs/blocks
    whole blocks are removed at once, by one calibration pass
"""


MEASURED = ("shapes", "widths", "source.safetensors", "refit")
"""What an interrupted run goes on from before its first step."""


def main(argv: list[str] | None = None) -> None:
    config = parse(ShearConfig, section="shear", argv=argv, examples=EXAMPLES)
    with kept_is_said(Path(config.output) / "shear.json", *MEASURED):
        from pruner.run import shear
        from trainer.memory import explain_out_of_memory

        with explain_out_of_memory(config.train):
            trainer = shear(config)
    if trainer is not None and trainer.stopping:
        sys.exit(STOPPED)


if __name__ == "__main__":
    run(main)
