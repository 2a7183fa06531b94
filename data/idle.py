"""Options that are given and have no effect, beside others or before themselves, are named."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from data.log import logger


def idle_options(config: Any) -> dict[str, str]:
    """Why options have no effect beside the others of `config`, by their names with underscores:
    what the `idle` methods of the dataclass and of those nested in it say, its own first."""
    own = getattr(config, "idle", None)
    found: dict[str, str] = own() if own is not None else {}
    for field in dataclasses.fields(config):
        inner = getattr(config, field.name)
        if dataclasses.is_dataclass(inner):
            found = idle_options(inner) | found
    return found


def say_idle(config: Any, values: Mapping[str, Any], given: Collection[str]) -> None:
    """Says which of the options named in `given` have no effect, one line per reason.

    Args:
        config: the command's options.
        values: the value of each option by name.
        given: names of options that were given, with underscores.
    """
    idle = idle_options(config)
    reasons: dict[str, list[str]] = {}
    for name, why in idle.items():
        if name in given:
            reasons.setdefault(why, []).append(_flag(name, values[name]))
    for why, flags in reasons.items():
        logger.info(f"note: no effect of {', '.join(flags)}: {why}")


def option_name(flag: str) -> str:
    """The option's name, with underscores, that `flag` or its negation sets."""
    return flag.removeprefix("--").removeprefix("no-").replace("-", "_")


def say_repeated(names: Sequence[str]) -> None:
    """Says which of the options in `names`, one for each flag that was given, are there twice."""
    for name in dict.fromkeys(names):
        times = names.count(name)
        if times > 1:
            flag = f"--{name.replace('_', '-')}"
            logger.info(f"note: {flag} is given {times} times, of which the last one counts")


def _flag(name: str, value: Any) -> str:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    entries = value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{words}", *map(str, entries)])
