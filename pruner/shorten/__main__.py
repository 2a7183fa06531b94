"""`python -m pruner.shorten`: whole blocks removed by importance, then a dense Hugging Face model.

Runs alone or under torchrun (`torchrun --nproc_per_node 8 -m pruner.shorten ...`).
"""

from pathlib import Path

from data.cli import parse, run
from pruner.shorten.config import SEARCHES, ShortenConfig

EXAMPLES = """
python -m pruner.shorten --source meta-llama/Llama-2-7b-hf --params 5.5b
    the six blocks without which perplexity rises least
python -m pruner.shorten --source models/SmolLM2-135M --remove 6 --criterion taylor \\
    --seq-len 256
python -m pruner.shorten --source models/SmolLM2-135M --ratio 0.2 --search greedy \\
    --seq-len 256
    blocks go one at a time, and the others are scored anew each time
python -m pruner.shorten --source models/SmolLM2-135M --remove 10 --then ffn=832 \\
    --criterion influence --seq-len 256
    blocks, and then channels of those that stay
torchrun --nproc_per_node 8 -m pruner.shorten --params 3.7b --output runs/short
"""


def main(argv: list[str] | None = None) -> None:
    config = parse(ShortenConfig, section="shorten", argv=argv, examples=EXAMPLES)
    from pruner.shorten.run import shorten
    from trainer.memory import explain_out_of_memory
    from trainer.stopping import kept_is_said

    report = Path(config.output) / "shear.json"
    # Other criteria take one pass, which begins anew.
    scored = ["scores"] if config.criterion == "ppl" or config.search in SEARCHES else []
    with kept_is_said(report, *scored, "refit"), explain_out_of_memory(config.train):
        shorten(config)


if __name__ == "__main__":
    run(main)
