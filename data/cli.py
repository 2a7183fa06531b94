"""Command-line parsing and the entry-point guard shared by every program.

A program's options are the fields of its config dataclass; nested dataclasses are flattened. A
value comes from, strongest first: the flag, the environment variable `SHORN_<FIELD>`, the program's
section of `shorn.toml`, the dataclass default.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import shlex
import signal
import sys
import time
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from data.errors import InputError
from data.machine import rank

T = TypeVar("T")

CONFIG_VARIABLE = "SHORN_CONFIG"
VARIABLE_PREFIX = "SHORN_"
DEFAULT_FILE = "shorn.toml"
SECONDS_FOR_RANK_ZERO = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Override:
    """A value found outside the command line, not yet converted to its field's type."""

    value: Any
    origin: str


def parse(
    config: type[T],
    *,
    section: str,
    argv: list[str] | None = None,
    description: str | None = None,
    examples: str = "",
) -> T:
    """Builds `config` from flags, environment, `shorn.toml` and defaults.

    Args:
        config: dataclass type; fields that are dataclasses themselves are flattened into one level
            of flags.
        section: table of `shorn.toml` that belongs to this program.
        argv: arguments without the program name; default `sys.argv[1:]`.
        description: help text above the options; default the docstring of `config`.
        examples: shown under "examples" at the end of `--help`.

    Raises:
        InputError: a value does not fit its field or is refused by the config's own validation, or
            `shorn.toml` holds an unknown key.
        SystemExit: `--help` (status 0), an unknown flag or a missing required one (status 2).
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    fields = _flat_fields(config)
    _refuse_repeated_lists(arguments, fields)
    overrides = _file_overrides(section, fields) | _environment_overrides(fields)
    default = _default_instance(config, overrides)
    options: dict[str, Any] = {
        "prog": _program_name(),
        "args": arguments,
        "default": default,
        "description": description,
        "config": (tyro.conf.OmitArgPrefixes,),
    }
    try:
        with _silence():
            return typing.cast(T, tyro.cli(config, **options))
    except SystemExit as exit_request:
        cause = _validation_error(exit_request)
        if cause is not None:
            raise cause from None
        if rank() == 0:
            _print_usage(config, options, examples, overrides)
        elif exit_request.code:
            _wait_for_rank_zero()
        raise


def run(main: Callable[[], None]) -> None:
    """Calls `main`, turning user errors into one message and an exit status.

    `InputError` prints `error: ...` on rank 0 and exits with 2, Ctrl-C exits with 130. Another rank
    gives rank 0 half a minute to report first, because a launcher stops the whole group as soon as
    one member exits, and speaks up only if rank 0 did not.
    """
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


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the parser from printing, so that each error is shown once and by the right process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _program_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]


def _nested_type(annotation: Any) -> type | None:
    return annotation if dataclasses.is_dataclass(annotation) else None  # type: ignore[return-value]


def _typed_fields(config: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    annotations = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        if field.init:
            yield field, annotations[field.name]


def _option_name(field_name: str, annotation: Any) -> str:
    """The option's name with underscores; `tyro.conf.arg(name=...)` on a field renames it."""
    for marker in getattr(annotation, "__metadata__", ()):
        name = getattr(marker, "name", None)
        if isinstance(name, str):
            return name.replace("-", "_")
    return field_name


def _flat_fields(config: type) -> dict[str, Any]:
    """Maps each option's name to its annotation."""
    flat: dict[str, Any] = {}
    for field, annotation in _typed_fields(config):
        nested = _nested_type(annotation)
        names = (
            _flat_fields(nested) if nested else {_option_name(field.name, annotation): annotation}
        )
        clash = flat.keys() & names.keys()
        assert not clash, f"{config.__name__} has two options named {sorted(clash)}"
        flat.update(names)
    return flat


def _refuse_repeated_lists(arguments: list[str], fields: Mapping[str, Any]) -> None:
    """The parser would keep only the last occurrence, which loses values without a word."""
    for name, annotation in fields.items():
        flag = "--" + name.replace("_", "-")
        if _takes_several(annotation) and arguments.count(flag) > 1:
            raise InputError(
                f"{flag} is given {arguments.count(flag)} times; "
                f"give all values after one: {flag} A B"
            )


def _file_overrides(section: str, fields: Mapping[str, Any]) -> dict[str, _Override]:
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
    found: dict[str, _Override] = {}
    for key, value in content[section].items():
        name = key.replace("-", "_")
        if name not in fields:
            near_names = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean `{near_names[0]}`? " if near_names else ""
            raise InputError(
                f"{path}: unknown key `{key}` in [{section}]; {hint}known: {', '.join(fields)}"
            )
        found[name] = _Override(value, f"{path} [{section}] {key}")
    return found


def _environment_overrides(fields: Mapping[str, Any]) -> dict[str, _Override]:
    found: dict[str, _Override] = {}
    for name in fields:
        variable = VARIABLE_PREFIX + name.upper()
        text = os.environ.get(variable)
        if text and variable != CONFIG_VARIABLE:
            found[name] = _Override(text, variable)
    return found


def _plain(annotation: Any) -> Any:
    """The type inside `Annotated[...]`."""
    return typing.get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _takes_several(annotation: Any) -> bool:
    return typing.get_origin(_plain(annotation)) in (tuple, list)


def _convert(override: _Override, annotation: Any) -> Any:
    """Converts a TOML or environment value just as the same text on the command line would be."""
    import tyro

    value = override.value
    if isinstance(value, str):
        words = shlex.split(value) if _takes_several(annotation) else [value]
    elif isinstance(value, list):
        words = [str(entry) for entry in value]
    else:
        words = [str(value)]
    plain = _plain(annotation)
    # The marker keeps words that start with a dash from being read as flags.
    marked: Any = typing.Annotated[plain, tyro.conf.Positional]
    try:
        with _silence():
            return tyro.cli(marked, args=["--", *words])
    except SystemExit:
        expected = plain.__name__ if isinstance(plain, type) else str(plain).replace("typing.", "")
        message = f"{override.origin} = {value!r} is not a valid value: expected {expected}"
    raise InputError(message)


def _default_instance(config: type, overrides: Mapping[str, _Override], base: Any = None) -> Any:
    """An instance of `config` with overridden defaults; required fields are marked missing.

    Its `__post_init__` does not run: only the complete, final configuration is validated.
    """
    import tyro

    instance: Any = object.__new__(config)
    for field, annotation in _typed_fields(config):
        if base is not None:
            value = getattr(base, field.name)
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        nested = _nested_type(annotation)
        if nested:
            value = _default_instance(nested, overrides, None if value is tyro.MISSING else value)
        elif (name := _option_name(field.name, annotation)) in overrides:
            value = _convert(overrides[name], annotation)
        object.__setattr__(instance, field.name, value)
    return instance


def _validation_error(error: BaseException | None) -> InputError | None:
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _print_usage(
    config: type,
    options: dict[str, Any],
    examples: str,
    overrides: Mapping[str, _Override],
) -> None:
    """Prints the help text, or the parser's error message."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(config, **options)
    arguments = options["args"]
    if "-h" not in arguments and "--help" not in arguments:
        return
    if overrides:
        print("\ndefaults taken from:")
        for name, override in overrides.items():
            print(f"  --{name.replace('_', '-')} = {override.value}   ({override.origin})")
    if examples:
        print("\nexamples:")
        for line in examples.strip("\n").splitlines():
            print(f"  {line}" if line else "")
