"""What `shorn` says about itself."""

import tomllib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from launch.shorn.commands import COMMANDS

TEXT = """usage: shorn COMMAND [options]

Makes large language models smaller: prunes them to a named shape, continues
their pre-training, measures them.

commands:
{commands}

options:
  --ranks N      in N processes, one per GPU:
                 {able}
  --version      print the version
  --completion bash|zsh|fish
                 print a script that completes command lines

examples:
  shorn shear --help
  shorn tokenize --input 'text/**/*.md' --tokenizer models/llama
  shorn shear --ranks 8 --source models/llama --target 1.3b
  shorn cpt --ranks 8
  eval "$(shorn --completion bash)"
"""


def overview() -> str:
    """All commands with a line each, and examples."""
    able = [name for name, command in COMMANDS.items() if command.on_ranks]
    lines = [f"  {name:15}{command.summary}" for name, command in COMMANDS.items()]
    return TEXT.format(commands="\n".join(lines), able=", ".join(able)).rstrip()


def version() -> str:
    """The installed package's version; in a clone that is not installed, pyproject.toml's."""
    try:
        return installed_version("shorn")
    except PackageNotFoundError:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
        return str(tomllib.loads(text)["project"]["version"])
