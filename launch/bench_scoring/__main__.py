"""Time of scoring all blocks in one pass against the naive loop, which runs the model once without
each.

Both take turns in one process, on the same sequences, one at a time; ratios are medians over
rounds. Scores are compared, too.
"""

from data import cli
from launch.bench_scoring.config import BenchScoringConfig

EXAMPLES = """
python -m launch.bench_scoring --json scoring.json
python -m launch.bench_scoring --source models/SmolLM2-135M --precision bf16
python -m launch.bench_scoring --hidden 4096 --heads 32 --ffn 11008 --vocabulary 32000 \\
    --seq-len 4096 --precision bf16
    on a GPU of 80 GB: LLaMA-2-7B's shape
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(BenchScoringConfig, section="bench_scoring", argv=argv, examples=EXAMPLES)
    from launch.bench_scoring.timing import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
