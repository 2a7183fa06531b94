"""The one exception type for mistakes a user can fix, and the checks of options that raise it."""

import dataclasses
from math import isfinite
from typing import Any


class InputError(Exception):
    """Bad input, configuration or environment.

    The message names the offending value, the limit it breaks and the remedy. Commands print it
    without a traceback and exit with status 2 (`data.cli.run`).
    """


def require(condition: bool, name: str, value: object, limit: str) -> None:
    """Raises InputError naming the flag of the option `name` unless `condition` holds."""
    if not condition:
        raise InputError(f"--{name.replace('_', '-')} {value}: must be {limit}")


def require_at_least(config: object, limit: float, *names: str, why: str = "") -> None:
    """Raises InputError unless the named options of `config` are `limit` or more.

    Each entry of a tuple counts; None is an option left out.
    """
    for name in names:
        value = getattr(config, name)
        for entry in value if isinstance(value, tuple) else (value,):
            require(entry is None or entry >= limit, name, entry, f"at least {limit}{why}")


def require_finite(config: Any) -> None:
    """Raises InputError when a number among the fields of the dataclass `config` is not finite."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float):
            require(isfinite(value), field.name, value, "a finite number")
