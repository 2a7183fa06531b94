"""Held-out loss and perplexity per domain, document perplexity of a text file, decoding speed.

Under torchrun every rank holds the whole model and scores its share of the sequences.
"""

from data import cli
from launch.evaluate.config import EvaluateConfig

EXAMPLES = """
python -m launch.evaluate --model runs/cpt --data runs/tokens
python -m launch.evaluate --model runs/cpt --data runs/tokens --sequences 16
python -m launch.evaluate --model runs/cpt --text wiki.txt --json ppl.json
python -m launch.evaluate --model llama runs/shear runs/cpt --data runs/tokens --speed
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(EvaluateConfig, section="evaluate", argv=argv, examples=EXAMPLES)
    from launch.evaluate.run import run

    run(config)


if __name__ == "__main__":
    cli.run(main)
