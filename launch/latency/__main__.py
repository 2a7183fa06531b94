"""How fast models generate: time to the first token, per token, tokens per second, memory.

Plain transformers, `generate` with a cache, greedy; a prompt of 12 tokens and 128 new ones, as in
Shortened LLaMA (arXiv 2402.02834, section 4.1), without its sampling.
"""

from data import cli
from launch.latency.config import LatencyConfig

EXAMPLES = """
python -m launch.latency models/llama runs/shear runs/cpt
python -m launch.latency runs/cpt --batch 1 16 64 --new-tokens 512 --json latency.json
python -m launch.latency models/llama runs/cpt --quality losses.json --plot trade.png
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(LatencyConfig, section="latency", argv=argv, examples=EXAMPLES)
    from launch.latency.run import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
