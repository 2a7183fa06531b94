"""Models for other programs: GGUF files, read back and compared before they are called finished."""

from data import cli
from launch.export.config import ExportConfig

EXAMPLES = """
python -m launch.export runs/cpt
python -m launch.export runs/cpt --to gguf-f16 gguf-q8_0 gguf-q4_0 --output exports
python -m launch.export models/llama --to gguf-bf16 --check tensors --json export.json
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ExportConfig, section="export", argv=argv, examples=EXAMPLES)
    from launch.export.run import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
