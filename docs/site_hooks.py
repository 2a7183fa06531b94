"""What mkdocs calls while it builds the site: pages that are made from the code and from README.

Each command gets a page with all its options, read from its config; README, CONTRIBUTING, CHANGELOG
and csrc/README become pages too, their links changed to where their targets are in the site.
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from data.cli import all_options, essential_names
from data.help_page import command_lines, default_of, usage_of
from data.options import Option
from launch.shorn.commands import COMMANDS, Command

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "csrc/README.md": "csrc.md",
}
"""Files outside docs/ that the site shows, and the names of their pages."""


def on_config(config: Any) -> Any:
    """Orders the pages: commands as `shorn` lists them, records from the newest on."""
    records = sorted((ROOT / "docs" / "benchmarks").glob("2*.md"), reverse=True)
    decisions = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    config["nav"] = [
        {"Start": "index.md"},
        {"Guide": "guide.md"},
        {"Commands": [{name: f"commands/{name}.md"} for name in COMMANDS]},
        {"Records": ["benchmarks/README.md", *(f"benchmarks/{path.name}" for path in records)]},
        {"Decisions": ["decisions/README.md", *(f"decisions/{path.name}" for path in decisions)]},
        {"Files": "files.md"},
        {"C++ and CUDA": "csrc.md"},
        {"Contributing": "contributing.md"},
        {"Roadmap": "roadmap.md"},
        {"Lab notebook": "lab-notebook.md"},
        {"Changes": "changes.md"},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not files in docs/."""
    for source, name in ROOT_PAGES.items():
        text = relink((ROOT / source).read_text("utf-8"))
        files.append(File.generated(config, name, content=text))
    for name, command in COMMANDS.items():
        page = command_page(name, command)
        files.append(File.generated(config, f"commands/{name}.md", content=page))
    return files


def relink(text: str) -> str:
    """The text of a page at the site's root, with the links of a file at the repository's root."""
    for source, name in ROOT_PAGES.items():
        text = text.replace(f"]({source}", f"]({name}")
    text = re.sub(r"(\]\(|src=\")docs/", r"\1", text)
    # What is neither a page nor a picture of the site stays a name.
    return re.sub(r"\[([^\]]+)\]\((?:LICENSE|Makefile)\)", r"\1", text)


def command_page(name: str, command: Command) -> str:
    """What `shorn NAME --help-all` says, as a page."""
    config, module = command.load_config(), importlib.import_module(command.module)
    options = all_options(config)
    by_name = {option.name: option for option in options}
    essential = [by_name[name] for name in essential_names(config, options)]
    long_form = command.module.removesuffix(".__main__")
    ranks = "[--ranks N] " if command.on_ranks else ""
    words = "".join(f"[{option.metavar}] " for option in options if option.metavar)
    described = re.sub(r"\n\s*\n", "\n\n", re.sub(r"\n *", "\n", config.__doc__ or "")).strip()
    parts = [f"# shorn {name}", described, f"```\nshorn {name} {ranks}{words}[options]\n```"]
    parts += [f"Long form: `python -m {long_form}`.", "## Options to know"]
    parts += entries(essential)
    lines = command_lines(module.EXAMPLES, f"shorn {name}")
    parts += ["## Examples", "```text\n" + "\n".join(lines) + "\n```"]
    others = [option for option in options if option not in essential]
    for section in dict.fromkeys(option.section for option in others):
        parts.append(f"## {section or 'More options'}")
        parts += entries([option for option in others if option.section == section])
    return "\n\n".join(parts) + "\n"


def entries(options: Sequence[Option]) -> list[str]:
    """One entry of a definition list per option."""
    return [
        f"{f'`{usage_of(option)}` {default_of(option)}'.rstrip()}\n:   {_escape(option.text)}"
        for option in options
    ]


def _escape(text: str) -> str:
    """Help as Markdown: what is between backquotes stays code, the rest shows as it is written."""
    parts = text.split("`")
    plain = [re.sub(r"([\\*_<>\[\]])", r"\\\1", part) for part in parts]
    return "`".join(part if index % 2 else plain[index] for index, part in enumerate(parts))
