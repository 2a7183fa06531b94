"""The whole main job on a real 135M model and two CPU cores: `make demo`."""

import sys
from importlib.util import find_spec

from data import cli
from data.errors import InputError
from launch.demo.config import DemoConfig

EXAMPLES = """
python -m launch.demo
python -m launch.demo --source models/SmolLM2-135M --output runs/demo-local
python -m launch.demo --shear-steps 4 --cpt-steps 4 --output runs/demo-short
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(DemoConfig, section="demo", argv=argv, examples=EXAMPLES)
    missing = [name for name in ("gguf", "accelerate", "matplotlib") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"the demo needs {', '.join(missing)}: pip install gguf accelerate matplotlib"
        )
    from launch.demo.stages import Demo

    sys.exit(Demo(config).run())


if __name__ == "__main__":
    cli.run(main, alone=True)
