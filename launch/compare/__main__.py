"""Held-out losses of pruning methods at equal tokens, with their spread over seeds.

Every method gets the same documents, the same number of training tokens and, as nearly as whole
blocks allow, the same number of parameters. Finished stages are reused, so an interrupted
comparison goes on where it stopped, and methods, targets and seeds can be added later.
"""

from data import cli
from launch.compare.config import CompareConfig

EXAMPLES = """
python -m launch.compare --source models/SmolLM2-135M \\
    --input 'SlimPajama/train/**/*.zst' --json compare.json
    eleven methods, two targets, three seeds
python -m launch.compare --source models/SmolLM2-135M --input 'text/*.zst' \\
    --methods ours --targets half --seeds 0
    one run of shearing and continued pre-training
python -m launch.compare --source models/SmolLM2-135M --input 'text/*.zst' \\
    --methods ours --variant 'taylor=--init taylor' 'cooler=|--lr 3e-4'
    ours with other flags: of pruner.shear, then after | of launch/cpt.py
python -m launch.compare --source models/Qwen3-0.6B --input 'text/*.zst' \\
    --targets small=layers=20,hidden=768,heads=12,kv-heads=6,ffn=2048
python -m launch.compare --source models/SmolLM2-135M --input 'text/*.zst' \\
    --dead-units
    kept and on units under both rules at three sparsities
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(CompareConfig, section="compare", argv=argv, examples=EXAMPLES)
    from launch.compare.run import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
