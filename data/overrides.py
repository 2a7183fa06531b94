"""Values of options that are given elsewhere than on the command line: `shorn.toml` and the
environment."""

import difflib
import os
import shlex
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.log import LEVEL_VARIABLE, logger
from data.machine import PARENT
from data.options import Option, convert, describe, without_commas
from data.paths import home_expanded
from data.records import read_text

CONFIG_VARIABLE = "SHORN_CONFIG"
VARIABLE_PREFIX = "SHORN_"
DEFAULT_FILE = "shorn.toml"
SECTIONS = (
    "tokenize",
    "shear",
    "shorten",
    "cpt",
    "finetune",
    "evaluate",
    "latency",
    "report",
    "compare",
    "demo",
    "bench_kernels",
    "bench_shear",
    "bench_scoring",
)
"""Tables of shorn.toml that some command reads."""
OTHER_VARIABLES = (CONFIG_VARIABLE, LEVEL_VARIABLE, PARENT, "SHORN_CUDA")
"""Variables that are ours without being options: SHORN_CUDA has setup.py build CUDA code."""


@dataclass(frozen=True, slots=True)
class Override:
    """A value found outside the command line, not yet converted to its field's type."""

    value: Any
    origin: str

    @property
    def text(self) -> str:
        """The value as words of a command line."""
        entries = self.value if isinstance(self.value, list) else [self.value]
        return " ".join(map(str, entries))


def warn_of_unknown_variables(options: Sequence[Option]) -> None:
    """Names the SHORN_ variables that this command does not read."""
    names = [VARIABLE_PREFIX + option.name.upper() for option in options]
    for variable in sorted(os.environ):
        known = variable in names or variable in OTHER_VARIABLES or not os.environ[variable]
        if known or not variable.upper().startswith(VARIABLE_PREFIX):
            continue
        near = difflib.get_close_matches(variable.upper(), names, n=1, cutoff=0.8)
        text = f"{variable} is set, but names no option of this command"
        if near:
            logger.warning(f"{text}; did you mean {near[0]}?")
        else:  # perhaps another command's
            logger.info(text)


def file_overrides(section: str, options: Sequence[Option]) -> dict[str, Override]:
    """The values of the program's `section` of shorn.toml, by the name of their option. Raises
    InputError for a file that cannot be read so."""
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(home_expanded(named or DEFAULT_FILE, CONFIG_VARIABLE))
    if not path.is_file():
        if path.exists() or path.is_symlink():
            raise InputError(
                f"{path}: not a regular file, or a link to none; write the options into a file, or "
                + (f"unset {CONFIG_VARIABLE}" if named else "move it away")
            )
        if named:
            raise InputError(f"{CONFIG_VARIABLE}={named}: no such file; correct it or unset it")
        return {}
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for key, value in content.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            raise InputError(
                f"{path}: [[{key}]] begins one of several tables; write [{key}], which there is "
                "once"
            )
        if not isinstance(value, dict):
            raise InputError(
                f"{path}: `{key}` stands outside a section; put it under the section of the program"
                f" it is for, such as [{section}]"
            )
    if section not in content:
        strange = [name for name in content if name not in SECTIONS]
        for near in difflib.get_close_matches(section, strange, n=1, cutoff=0.7):
            raise InputError(f"{path}: unknown section [{near}]; did you mean [{section}]?")
    _warn_of_unknown_sections(path, [name for name in content if name != section])
    if section not in content:
        return {}
    names = [option.name for option in options]
    found: dict[str, Override] = {}
    for key, value in content[section].items():
        name = key.replace("-", "_")
        if name not in names:
            positive = name.removeprefix("no_")
            if any(option.name == positive and option.type is bool for option in options):
                raise InputError(
                    f"{path}: `{key}` in [{section}] is a flag's name; write "
                    f"`{positive.replace('_', '-')} = false` in its place"
                )
            near_names = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near_names[0]}`? " if near_names else ""
            raise InputError(
                f"{path}: unknown key `{key}` in [{section}]; {hint}known: {', '.join(names)}"
            )
        if name in found:
            raise InputError(f"{path}: [{section}] holds `{name}` in two spellings; keep one")
        found[name] = Override(value, f"{path} [{section}] {key}")
    return found


def _warn_of_unknown_sections(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1)
            hint = f"did you mean [{near[0]}]?" if near else f"known: {', '.join(SECTIONS)}"
            logger.warning(f"{path}: no command reads section [{name}]; {hint}")


def environment_overrides(options: Sequence[Option]) -> dict[str, Override]:
    """The values of SHORN_ variables, by the name of their option."""
    found: dict[str, Override] = {}
    for option in options:
        variable = VARIABLE_PREFIX + option.name.upper()
        text = os.environ.get(variable)
        if text and variable != CONFIG_VARIABLE:
            found[option.name] = Override(text, variable)
    return found


def converted(override: Override, kind: Any) -> Any:
    """The value, just as the same text on the command line would be. Raises InputError where it is
    none."""
    value = override.value
    try:
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, list | dict) for entry in entries):
            raise ValueError(value)
        # As a text, `json = false` would be a file called False.
        if any(isinstance(entry, bool) for entry in entries) and kind is not bool:
            raise ValueError(value)
        if isinstance(value, list):
            words = [str(entry) for entry in value]
        elif isinstance(value, str) and typing.get_origin(kind) is tuple:
            words = shlex.split(value) or [value]
        else:
            words = [str(value)]
        return convert(words, kind)
    except ValueError:
        pairs = _as_pairs(value) if describe(kind) == "TEXT" else ""
        if pairs:
            raise InputError(
                f"{override.origin} = {value!r} is not a valid value: expected one text, with the "
                f'pairs in it: "{pairs}"'
            ) from None
        several = isinstance(value, str) and typing.get_origin(kind) is tuple
        spaced = without_commas([value], kind) if several else ""
        if spaced:
            raise InputError(
                f'{override.origin} = {value!r}: values are separated by spaces: "{spaced}"'
            ) from None
        fix = ", in words as a shell reads them: quote what holds blanks or quotes"
        if isinstance(value, bool):
            fix = "; leave the key out where nothing is meant"
        raise InputError(
            f"{override.origin} = {value!r} is not a valid value: expected {describe(kind)}"
            + (fix if several or isinstance(value, bool) else "")
        ) from None


def _as_pairs(value: Any) -> str:
    """A table or list of names with values as options take it, "a=1,b=2"; empty for another."""
    if isinstance(value, dict) and all(isinstance(entry, int | float) for entry in value.values()):
        return ",".join(f"{name}={entry}" for name, entry in value.items())
    if isinstance(value, list) and all(isinstance(entry, str) and "=" in entry for entry in value):
        return ",".join(value)
    return ""
