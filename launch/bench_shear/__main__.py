"""Time of a shearing step against the dense source's and against the target's own training step.

All kinds of steps are taken in turns in one process by the real trainer on random tokens; ratios
are medians over neighbouring pairs.
"""

from data import cli
from launch.bench_shear.config import BenchShearConfig

EXAMPLES = """
python -m launch.bench_shear --json shear-timing.json
python -m launch.bench_shear --precision bf16 --seq-len 1024 --repeats 15
python -m launch.bench_shear --hidden 2048 --layers 24 --heads 16 --ffn 5504 \\
    --vocabulary 32000 --target 370m --precision bf16 --batch 2 --seq-len 4096
    on a GPU of 80 GB: weights, gradients and Adam's moments take 28 GB
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(BenchShearConfig, section="bench_shear", argv=argv, examples=EXAMPLES)
    from launch.bench_shear.timing import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
