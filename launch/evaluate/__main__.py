"""Held-out loss per domain, document perplexity of a text file, accuracy on tasks, decoding speed.

Under torchrun every rank holds the whole model and scores its share of sequences and tasks.
"""

from data import cli
from launch.evaluate.config import EvaluateConfig

EXAMPLES = """
python -m launch.evaluate --model runs/cpt --data runs/tokens
python -m launch.evaluate --model runs/cpt --data runs/tokens --sequences 16
python -m launch.evaluate --model runs/cpt --text wiki.txt --json ppl.json
python -m launch.evaluate --model llama runs/shear runs/cpt --data runs/tokens --speed
python -m launch.evaluate --model llama runs/cpt --tasks piqa arc_easy --json tasks.json
python -m launch.evaluate --model llama runs/cpt --tasks shortened-llm
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(EvaluateConfig, section="evaluate", argv=argv, examples=EXAMPLES)
    from launch.evaluate.run import run

    run(config)


if __name__ == "__main__":
    cli.run(main)
