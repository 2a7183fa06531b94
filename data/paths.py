"""Paths as users write them, and as commands are told to be typed."""

import errno
import os
import re
import shlex
from pathlib import Path

from data.errors import NO_WORKING_FOLDER, InputError, failure

_VARIABLE = re.compile(r"\$\{\w+\}|(?:^|(?<=/))\$[A-Za-z_]\w*(?=/|$)|\$[A-Z][A-Z0-9_]+")
"""What a shell would have replaced by a variable's value: `${name}`, `$name` as a whole part of a
path, `$NAME` within one."""


def home_expanded(text: str | Path, option: str) -> str:
    """A path with `~` or `~user` in front written out, which a shell leaves alone in quotes and
    after `=`.

    A name that merely starts with `~`, or a folder here that is called so, stays. Raises
    InputError, naming `option`, where nothing tells where that home is, and for a variable that no
    shell has written out, unless there is something of that name.
    """
    text = str(text)
    _refuse_variable(text, option)
    first, _, rest = text.partition("/")
    _require_no_circle(text, option)
    if not first.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        if first != "~" and (not rest or os.path.lexists(first)):
            return text
    whose = "your" if first == "~" else f"{first[1:]}'s"
    raise InputError(
        f"{option} {text}: {whose} home folder is not known; give the path without `~`, or as "
        f"./{text} if a folder here is called {first}"
    )


def _refuse_variable(text: str, option: str) -> None:
    for found in _VARIABLE.finditer(text):
        if not os.path.lexists(text[: found.end()] + text[found.end() :].partition("/")[0]):
            raise InputError(
                f"{option} {text}: the variable {found[0]} stays as it is in single quotes, in "
                "shorn.toml and in SHORN_ variables: use double quotes on the command line, or "
                "write its value out (what is called so itself has to be there before)"
            )


def _require_no_circle(text: str, option: str) -> None:
    """Raises InputError for links that lead to each other, which `Path.resolve` does not take."""
    try:
        Path(text).stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{option} {text}: {failure(error)}") from None
    except ValueError:  # a name that no file can have is for its reader to refuse
        pass


def require_utf8(path: str | Path) -> None:
    """Raises InputError for a path that libraries which take UTF-8 alone cannot open."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{path}: the path is not UTF-8, and models and tokenizers are read from no other; "
            "rename the folder, or name it by a link"
        ) from None


def beside(folder: Path, suffix: str) -> Path:
    """Where a folder of the same name with `suffix` lies; `.` and `..` go by their own names."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return Path(f"{named}{suffix}")


def as_word(path: str | Path) -> str:
    """A path as a word of a command, which is neither an option nor below the home folder."""
    return f"./{path}" if str(path).startswith(("-", "~")) else str(path)


def quoted(path: str | Path) -> str:
    """The same as it is typed in a shell, in quotes where it holds spaces or the like."""
    return shlex.quote(as_word(path))


def require_working_folder() -> None:
    """Raises InputError if the folder that the process works in was removed: libraries that look
    for their files from there would abort the process."""
    try:
        Path.cwd()
    except OSError:
        raise InputError(NO_WORKING_FOLDER) from None
