"""Command-line parsing and the entry-point guard shared by every program.

A program's options are the fields of its config dataclass; nested dataclasses are flattened. A
value comes from, strongest first: the flag, the environment variable `SHORN_<FIELD>`, the program's
section of `shorn.toml`, the dataclass default.
"""

import contextlib
import dataclasses
import difflib
import os
import shlex
import signal
import sys
import time
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.errors import InputError
from data.help_page import help_page
from data.log import LEVELS, level, set_level
from data.machine import rank
from data.options import Option, build, convert, describe, options_of
from data.plain_parser import parse_plainly
from data.terminal import escape_what_streams_lack

T = TypeVar("T")

CONFIG_VARIABLE = "SHORN_CONFIG"
VARIABLE_PREFIX = "SHORN_"
DEFAULT_FILE = "shorn.toml"
SECONDS_FOR_RANK_ZERO = 30.0
HELP_FLAGS = ("-h", "--help", "--help-all")
LOG_LEVEL = Option(
    "log_level",
    Literal[LEVELS],
    "info",
    "How much is shown. debug: messages of all ranks too; warning, error: no progress.",
)


@dataclass(frozen=True, slots=True)
class _Override:
    """A value found outside the command line, not yet converted to its field's type."""

    value: Any
    origin: str


def parse(
    config: type[T],
    *,
    section: str,
    argv: list[str] | None = None,
    examples: str = "",
) -> T:
    """Builds `config` from flags, environment, `shorn.toml` and defaults.

    Args:
        config: dataclass type; fields that are dataclasses themselves are flattened into one level
            of flags. Its docstring is what `--help` says the command does; its `ESSENTIAL`,
            where it has one, names the options that `--help` shows, in words; `--help-all` shows
            all.
        section: table of `shorn.toml` that belongs to this program.
        argv: arguments without the program name; default `sys.argv[1:]`.
        examples: command lines shown by `--help`.

    Raises:
        InputError: a value does not fit its field or is refused by the config's own validation, or
            `shorn.toml` holds an unknown key.
        SystemExit: help (status 0), an unknown flag or a missing required one (status 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = all_options(config)
    overrides = _file_overrides(section, options) | _environment_overrides(options)
    options = [
        dataclasses.replace(option, default=_convert(overrides[option.name], option.type))
        if option.name in overrides
        else option
        for option in options
    ]
    if not set(words).isdisjoint(HELP_FLAGS):
        if rank() == 0:
            _print_help(config, options, overrides, examples, "--help-all" in words)
        sys.exit(0)
    _refuse_repeated_lists(words, options)
    values = _parse_words(options, words)
    if values["log_level"] != level():
        set_level(values["log_level"])
    return build(config, values)


def all_options(config: type) -> list[Option]:
    """The options of the command whose config is `config`: those of every command too."""
    return [*options_of(config), LOG_LEVEL]


def essential_names(config: type, options: Sequence[Option]) -> list[str]:
    """Names of the options of `config` that `--help` shows."""
    if not hasattr(config, "ESSENTIAL"):
        return [option.name for option in options]
    return [*config.ESSENTIAL.replace("-", "_").split(), LOG_LEVEL.name]


def program_name() -> str:
    """How this command was started, as `--help` shows it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith("shorn "):
        return sys.argv[0]
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def show(text: str) -> None:
    """Prints help to whoever reads it, be it `head`, which may have seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer goes nowhere when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(main: Callable[[], None]) -> None:
    """Calls `main`, turning user errors into one message and an exit status.

    `InputError` prints `error: ...` on rank 0 and exits with 2, Ctrl-C exits with 130. Another rank
    gives rank 0 half a minute to report first, because a launcher stops the whole group as soon as
    one member exits, and speaks up only if rank 0 did not.
    """
    escape_what_streams_lack()
    try:
        main()
    except InputError as error:
        if rank() == 0:
            message = f"error: {error}"
        else:
            _wait_for_rank_zero()
            message = f"error (rank {rank()}): {error}"
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        if _has_process_group():
            _exit_at_once(2)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _exit_at_once(0)


def _has_process_group() -> bool:
    # Nobody who has not imported torch has one, and importing it takes seconds.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(
        distributed.is_available() and distributed.is_initialized()
    )


def _exit_at_once(status: int) -> None:
    # Communication threads now and then abort or hang a rank while the interpreter takes itself
    # down, and the launcher would report a finished run as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait_for_rank_zero() -> None:
    # A handler installed for graceful shutdown would keep this process waiting after the launcher
    # asked it to stop.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(SECONDS_FOR_RANK_ZERO)


def _refuse_repeated_lists(words: list[str], options: Sequence[Option]) -> None:
    """The parser would keep only the last occurrence, which loses values without a word."""
    for option in options:
        if option.takes_several and words.count(option.flag) > 1:
            raise InputError(
                f"{option.flag} is given {words.count(option.flag)} times; "
                f"give all values after one: {option.flag} A B"
            )


def _file_overrides(section: str, options: Sequence[Option]) -> dict[str, _Override]:
    named = os.environ.get(CONFIG_VARIABLE)
    path = Path(named or DEFAULT_FILE)
    if not path.is_file():
        if named:
            raise InputError(f"{CONFIG_VARIABLE}={named}: no such file; correct it or unset it")
        return {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    for key, value in content.items():
        if not isinstance(value, dict):
            raise InputError(
                f"{path}: `{key}` stands outside a section; put it under the section of the program"
                f" it is for, such as [{section}]"
            )
    if section not in content:
        for near in difflib.get_close_matches(section, content, n=1, cutoff=0.7):
            raise InputError(f"{path}: unknown section [{near}]; did you mean [{section}]?")
        return {}
    names = [option.name for option in options]
    found: dict[str, _Override] = {}
    for key, value in content[section].items():
        name = key.replace("-", "_")
        if name not in names:
            near_names = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near_names[0]}`? " if near_names else ""
            raise InputError(
                f"{path}: unknown key `{key}` in [{section}]; {hint}known: {', '.join(names)}"
            )
        found[name] = _Override(value, f"{path} [{section}] {key}")
    return found


def _environment_overrides(options: Sequence[Option]) -> dict[str, _Override]:
    found: dict[str, _Override] = {}
    for option in options:
        variable = VARIABLE_PREFIX + option.name.upper()
        text = os.environ.get(variable)
        if text and variable != CONFIG_VARIABLE:
            found[option.name] = _Override(text, variable)
    return found


def _convert(override: _Override, kind: Any) -> Any:
    """Converts a TOML or environment value just as the same text on the command line would be."""
    value = override.value
    try:
        if isinstance(value, list):
            words = [str(entry) for entry in value]
        elif isinstance(value, str) and typing.get_origin(kind) is tuple:
            words = shlex.split(value)
        else:
            words = [str(value)]
        return convert(words, kind)
    except ValueError:
        raise InputError(
            f"{override.origin} = {value!r} is not a valid value: expected {describe(kind)}"
        ) from None


def _parse_words(options: Sequence[Option], words: list[str]) -> dict[str, Any]:
    """The value of each option by name."""
    try:
        import tyro
    except ImportError:
        return parse_plainly(options, words)
    fields = [
        (
            option.name,
            typing.Annotated[option.type, tyro.conf.Positional] if option.metavar else option.type,
            dataclasses.field(default=option.default),
        )
        for option in options
    ]
    flat = dataclasses.make_dataclass("Options", fields, kw_only=True)
    try:
        program = program_name().partition(" [")[0]
        given: Any = tyro.cli(flat, prog=program, args=words, console_outputs=rank() == 0)
    except SystemExit:
        if rank() != 0:
            _wait_for_rank_zero()
        raise
    return {option.name: getattr(given, option.name) for option in options}


def _print_help(
    config: type,
    options: Sequence[Option],
    overrides: Mapping[str, _Override],
    examples: str,
    everything: bool,
) -> None:
    page = help_page(
        options,
        essential_names(config, options),
        everything=everything,
        program=program_name(),
        description=config.__doc__ or "",
        examples=examples,
    )
    if overrides:
        page += "\n\ndefaults taken from:"
        for name, override in overrides.items():
            page += f"\n  --{name.replace('_', '-')} = {override.value}   ({override.origin})"
    show(page)
