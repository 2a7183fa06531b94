"""Command-line parsing and the entry-point guard shared by every program.

A program's options are the fields of its config dataclass; nested dataclasses are flattened. A
value comes from, strongest first: the flag, the environment variable `SHORN_<FIELD>`, the program's
section of `shorn.toml`, the dataclass default.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.errors import InputError, explain
from data.given import note_given
from data.help_page import help_page
from data.idle import option_name, say_idle, say_repeated
from data.log import LEVELS, level, logger, set_level
from data.machine import LAUNCHED, end_with_parent, rank, stand_alone
from data.options import Option, build, options_of, summary, without_commas
from data.overrides import (
    Override,
    converted,
    environment_overrides,
    file_overrides,
    warn_of_unknown_variables,
)
from data.paths import require_working_folder
from data.places import is_address
from data.plain_parser import parse_plainly
from data.terminal import escape_what_streams_lack, is_broken_pipe

T = TypeVar("T")

STOPPED = 75
"""Exit status of a training run that was asked to stop and saved: the same command resumes it. It
is EX_TEMPFAIL of sysexits.h, which says: try again."""
INTERRUPTED = 130
"""Exit status after Ctrl-C where there was nothing to save."""
SECONDS_FOR_RANK_ZERO = 30.0
_WRITTEN = ("output", "json", "csv", "figures")
"""Options whose values are written to."""
HELP_FLAGS = ("-h", "--help", "--help-all")
LOG_LEVEL = Option(
    "log_level",
    Literal[LEVELS],
    "info",
    "How much is shown. debug: messages of all ranks too; warning, error: no progress.",
)


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
    overrides = file_overrides(section, options) | environment_overrides(options)
    given = _given_flags(words)
    own = options
    options = [
        dataclasses.replace(option, default=converted(overrides[option.name], option.type))
        if option.name in overrides
        else option
        for option in options
    ]
    if not set(words).isdisjoint(HELP_FLAGS):
        if rank() == 0:
            _print_help(config, options, overrides, examples, "--help-all" in words)
        sys.exit(0)
    _refuse_repeated_lists(given, options)
    _refuse_left_over(words, options)
    _refuse_commas(words, options)
    values = _parse_words(options, words)
    if values["log_level"] != level():
        set_level(values["log_level"])
    # Words without a flag are given where they are others than those found elsewhere.
    words_of = [one for one in options if one.metavar and values[one.name] != one.default]
    _say_origins(overrides, [*given, *(f"--{one.name.replace('_', '-')}" for one in words_of)])
    names = [option_name(flag) for flag in given]
    say_repeated(names)
    _refuse_empty(values, own, words)
    values = {option.name: option.home_expanded(values[option.name]) for option in options}
    warn_of_unknown_variables(options)
    built = build(config, values)
    note_given(section, own, values)
    say_idle(built, values, {*names, *overrides})
    return built


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


def run(main: Callable[[], None], *, alone: bool = False) -> None:
    """Calls `main`, turning user errors into one message and an exit status.

    `InputError`, a failure of the system (a file, a disk, memory) and a text that cannot be decoded
    print `error: ...` on rank 0 and exit with 2, Ctrl-C exits with 130; anything else is a defect
    and keeps its traceback. Another rank gives rank 0 half a minute to report first, because a
    launcher stops the whole group as soon as one member exits, and speaks up only if rank 0 did
    not. A rank that lost its peers waits too: the one that ended first knows the cause.

    Args:
        main: the command.
        alone: whether it always runs as one process: what the environment says of ranks is for
            others then.
    """
    status: Any = 0
    try:
        if alone:
            stand_alone()
        end_with_parent()
        escape_what_streams_lack()
        require_working_folder()
        main()
    except SystemExit as leaving:
        status = 128 + signal.SIGPIPE if is_broken_pipe(leaving) else leaving.code
    except KeyboardInterrupt:
        if rank() == 0:
            _complain("interrupted")
        status = INTERRUPTED
    except Exception as error:
        status = _report(error)
        if status is None:
            raise
    _settle_streams()
    if os.environ.get(LAUNCHED) or (status and _has_process_group()):
        _exit_at_once(status if isinstance(status, int) else int(status is not None))
    if status:
        sys.exit(status)


def _report(error: Exception) -> int | None:
    """Says what ended the command; its exit status. None where Python may print the traceback."""
    if is_broken_pipe(error):
        return 128 + signal.SIGPIPE  # whoever reads our output, such as `head`, has seen enough
    lost = _lost_a_peer(error)
    message = str(error) if isinstance(error, InputError) else explain(error)
    if lost:
        message = (
            f"lost the connection to another rank ({' '.join(str(error).split())}); see what that "
            "rank said, then run the same command again"
        )
    if message is None:
        if not _has_process_group():
            return None
        _complain(f"rank {rank()} failed:\n{traceback.format_exc().rstrip()}")
        return 1
    if level() == "debug" and not isinstance(error, InputError):
        _complain(traceback.format_exc().rstrip())
    if rank() or lost:
        _wait_for_rank_zero()
    own = f" (rank {rank()})" if rank() else ""
    _complain(f"error{own}: {message}")
    return 1 if lost else 2


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed, most likely because another rank has ended."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return _has_process_group() and (
        not names.isdisjoint(("DistBackendError", "DistNetworkError", "DistStoreError"))
        or (isinstance(error, RuntimeError) and "gloo" in str(error))
    )


def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _settle_streams() -> None:
    """Has what stdout and stderr could not write go nowhere: it would decide the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _has_process_group() -> bool:
    # Nobody who has not imported torch has one, and importing it takes seconds.
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(
        distributed.is_available() and distributed.is_initialized()
    )


def _exit_at_once(status: int) -> None:
    # Communication threads now and then abort or hang a rank while the interpreter takes itself
    # down, and the launcher would report a finished run as failed.
    _settle_streams()
    os._exit(status)


def _wait_for_rank_zero() -> None:
    # A handler installed for graceful shutdown would keep this process waiting after the launcher
    # asked it to stop.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(SECONDS_FOR_RANK_ZERO)


def _given_flags(words: Sequence[str]) -> list[str]:
    """The flags among `words` as options name them, whichever way they are spelled."""
    flags = (word.partition("=")[0] for word in words if word.startswith("--"))
    return ["--" + flag[2:].replace("_", "-") for flag in flags]


def _refuse_repeated_lists(given: Sequence[str], options: Sequence[Option]) -> None:
    """The parser would keep only the last occurrence, which loses values without a word."""
    for option in options:
        if option.takes_several and given.count(option.flag) > 1:
            raise InputError(
                f"{option.flag} is given {given.count(option.flag)} times; "
                f"give all values after one: {option.flag} A B"
            )


def _refuse_left_over(words: Sequence[str], options: Sequence[Option]) -> None:
    """Words behind the one value of an option, as a pattern leaves them that the shell spread."""
    if any(option.metavar for option in options):
        return
    flags = {option.flag: option for option in options}
    for start, word in enumerate(words):
        option = flags.get("".join(_given_flags([word.partition("=")[0]])))
        if option is None or option.takes_several:
            continue
        switch = option.type is bool
        behind = words[start + (1 if "=" in word or switch else 2) :]
        over = list(itertools.takewhile(lambda other: not other.startswith("-"), behind))
        if switch and (over or "=" in word):
            value = word.partition("=")[2] if "=" in word else over[0]
            raise InputError(
                f"{option.flag} takes no value, and {value!r} is given: {option.flag} turns it on, "
                f"--no-{option.flag[2:]} off"
            )
        if over:
            shown = " ".join(over[:3]) + (f" and {len(over) - 3} more" if len(over) > 3 else "")
            raise InputError(
                f"{option.flag} takes one value, and {shown} stood behind it: give one, in quotes "
                "where it holds spaces"
            )


def _refuse_commas(words: Sequence[str], options: Sequence[Option]) -> None:
    """Numbers of a list with commas between them, which the parser would call no numbers."""
    for option in options:
        if not option.takes_several:
            continue
        for start, word in enumerate(words):
            flag, equals, value = word.partition("=")
            if _given_flags([flag]) != [option.flag]:
                continue
            behind = words[start + 1 :]
            given = [value] if equals else list(itertools.takewhile(_is_value, behind))
            spaced = without_commas(given, option.type)
            if spaced:
                raise InputError(
                    f"{option.flag} {' '.join(given)}: values are separated by spaces: "
                    f"{option.flag} {spaced}"
                )


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _is_text(value: Any) -> bool:
    return isinstance(value, str | Path)


def _refuse_empty(
    values: Mapping[str, Any], options: Sequence[Option], words: Sequence[str]
) -> None:
    """An empty folder's name would stand for the working folder, and be written into; an address
    would be one of folders here."""
    for option in options:
        value = values[option.name]
        texts = [str(one) for one in (value if option.takes_several else (value,)) if _is_text(one)]
        # Path("") is Path(".").
        if option.on_disk and "" in words and not option.metavar:
            texts += [word for flag, word in itertools.pairwise(words) if flag == option.flag]
        empty = next((text for text in texts if not text.strip()), None)
        if empty is not None and option.default != "":
            raise InputError(
                f"{option.place} {empty!r}: is empty, perhaps by a variable that is "
                "not set; give a value, or leave the option out"
            )
        if option.name in _WRITTEN and "-" in texts:
            raise InputError(
                f"{option.place} -: standard output is for messages, and a file called - would be "
                "written; name a file or folder, such as out, and read that afterwards"
            )
        if option.name in _WRITTEN and any(map(is_address, texts)):
            raise InputError(
                f"{option.place} {texts[0]}: is an address, and only files and folders of this "
                "machine are written; name one, and upload it afterwards"
            )


def _say_origins(overrides: Mapping[str, Override], given: Sequence[str]) -> None:
    """Says which values did not come from the command line, without naming those it replaced."""
    for name, override in overrides.items():
        flag = f"--{name.replace('_', '-')}"
        # A command hands its log level on to those it starts.
        if name != LOG_LEVEL.name and not {flag, f"--no-{flag[2:]}"} & set(given):
            logger.info(f"{flag} {override.text}  (from {override.origin})")


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
    overrides: Mapping[str, Override],
    examples: str,
    everything: bool,
) -> None:
    page = help_page(
        options,
        essential_names(config, options),
        everything=everything,
        program=program_name(),
        description=summary(config),
        examples=examples,
    )
    if overrides:
        page += "\n\ndefaults taken from:"
        for name, override in overrides.items():
            page += f"\n  --{name.replace('_', '-')} = {override.text}   ({override.origin})"
    show(page)
