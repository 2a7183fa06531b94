"""The text that `--help` and `--help-all` print."""

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING

from data.options import Option, describe

NARROWEST, WIDEST = 50, 110
COLUMN = 26
"""Where the texts of options begin."""


def help_page(
    options: Sequence[Option],
    essential: Sequence[str],
    *,
    everything: bool,
    program: str,
    description: str,
    examples: str,
) -> str:
    """What a command does, the options to know, examples; with `everything` all other options.

    Args:
        options: all of the command's.
        essential: names of the options to know, in the order in which they are shown.
        everything: show all options.
        program: how the command is started.
        description: paragraphs.
        examples: command lines, each with its remarks below it, indented.
    """
    width = max(NARROWEST, min(shutil.get_terminal_size().columns, WIDEST))
    by_name = {option.name: option for option in options}
    first = [by_name[name] for name in essential]
    others = [option for option in options if option.name not in essential]
    words = "".join(f" [{option.metavar}]" for option in options if option.metavar)
    lines = [f"usage: {program}{words} [options]", ""]
    for paragraph in re.split(r"\n\s*\n", description.strip()):
        lines += [*_wrap(" ".join(paragraph.split()), width), ""]
    lines += _section("options", first, width)
    if examples:
        lines += ["examples:", *(f"  {line}" for line in command_lines(examples, program)), ""]
    if everything:
        for section in dict.fromkeys(option.section for option in others):
            chosen = [option for option in others if option.section == section]
            lines += _section(section or "more options", chosen, width)
    elif others:
        lines.append(f"--help-all shows the other {len(others)} options.")
    return "\n".join(lines).rstrip()


def command_lines(examples: str, program: str) -> list[str]:
    """The lines of `examples`; under the command `shorn` they begin as it does."""
    lines = examples.strip("\n").splitlines()
    if not program.startswith("shorn "):
        return lines
    name = " ".join(program.split()[:2])
    module = r"(?:-m )?[\w./]+"
    lines = [
        re.sub(rf"^torchrun --nproc_per_node (\d+) {module}", rf"{name} --ranks \1", line)
        for line in lines
    ]
    return [re.sub(rf"^python {module}", name, line) for line in lines]


def _section(title: str, options: Sequence[Option], width: int) -> list[str]:
    lines = [f"{title}:"]
    for option in options:
        left = f"  {usage_of(option)}"
        text = _wrap(f"{option.text} {default_of(option)}".strip(), width - COLUMN) or [""]
        if len(left) > COLUMN - 2:
            lines.append(left)
            left = ""
        lines.append(f"{left:{COLUMN}}{text[0]}".rstrip())
        lines += [" " * COLUMN + line for line in text[1:]]
    return [*lines, ""]


def _wrap(text: str, width: int) -> list[str]:
    """Lines that break at spaces only: flags, paths and shapes stay whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def usage_of(option: Option) -> str:
    """An option as a command line has it, such as `--steps INT`."""
    if option.metavar:
        return option.metavar
    if option.type is bool:
        return f"{option.flag}, --no-{option.flag[2:]}" if option.default is True else option.flag
    return f"{option.flag} {describe(option.type)}"


def default_of(option: Option) -> str:
    """What is said of an option's default; "" where its text says it."""
    value = option.default
    if value is MISSING:
        return "(required)"
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"(default: {'on' if value else 'off'})"
    if isinstance(value, tuple):
        value = " ".join(map(str, value)) or "none"
    return f"(default: {value})"
