"""The files that `--input` names: files, folders and globs, all by one walk.

The walk enters linked folders, leaves out what is hidden, and keeps paths as they were written: the
folder that a link stands in is what the user sees, not the one that its target lies in.
"""

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from data.errors import InputError, failure
from data.formats import DESCRIBING, FORMATS, is_known, refusal
from data.log import logger
from data.paths import home_expanded
from data.places import is_no_text, odd_name, what_is

GLOB_CHARACTERS = frozenset("*?[")
NAMED = 5
"""How many files a message names."""

Place = tuple[int, int]
"""Device and inode: what a folder is, whatever its path."""


@dataclass(slots=True)
class _Found:
    """What one pattern matched."""

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    """Links to what does not exist."""
    special: list[Path] = field(default_factory=list)
    """Pipes, sockets and devices."""
    hidden: list[Path] = field(default_factory=list)
    lost: list[Path] = field(default_factory=list)
    """Links without a suffix that lead nowhere, met on the way."""
    circles: list[Path] = field(default_factory=list)
    """Links to a folder that they lie in."""
    skipped: Place | None = None
    """A folder that is passed over."""


def find_files(patterns: Sequence[str], output: Path | None = None) -> list[Path]:
    """Files that match any of the patterns, sorted by path, each once.

    A pattern is a file, a folder (all its files of known formats) or a glob (`**` crosses folders).
    What exists under the very name of a pattern is taken, whatever characters are in it. A suffix
    of no known format counts as plain text if the pattern itself ends with it. Hidden files and
    folders are left out unless the pattern names them. What a folder leaves out, and a file found
    under two names, is said in a warning. The folder `output`, which holds what is made of the
    files, is passed over where it lies among them.

    Raises:
        InputError: a pattern matches nothing, files of unknown format or such as cannot be read as
            text, broken links, or a folder that cannot be read.
    """
    found: set[Path] = set()
    skipped = None
    if output is not None:
        # Whether it can be written is for its writer to say.
        with contextlib.suppress(OSError, InputError):
            skipped = _place(output)
    for pattern in patterns:
        if not pattern:
            raise InputError("--input '' is empty, as from a variable that is not set; correct it")
        path = Path(home_expanded(pattern, "--input"))
        if _exists(path):
            paths = _files_of_folder(pattern, path, skipped) if _is_dir(path) else [_one_file(path)]
        else:
            paths = _files_of_glob(pattern, path, skipped, patterns)
        found.update(paths)
    files = sorted(found, key=str)
    _warn_of_doubles(files)
    return files


def _files_of_folder(pattern: str, folder: Path, skipped: Place | None) -> list[Path]:
    _refuse_no_text(folder)
    found = _Found(skipped=skipped)
    _walk(folder, ["**", "*"], found, ())
    describing = [path for path in found.files if path.name in DESCRIBING]
    known = [path for path in found.files if is_known(path) and path not in describing]
    lost = [path for path in found.broken if not is_known(path)]
    found.broken = [path for path in found.broken if is_known(path)]
    found.special = [path for path in found.special if is_known(path)]
    _refuse_unusable(pattern, found)
    others = sorted(path for path in found.files if not is_known(path))
    parts = [
        (others, "of no known format"),
        (describing, "that describe a data set"),
        (found.hidden, "hidden"),
        (found.circles, "linked in a circle"),
        (lost, "links that lead nowhere"),
    ]
    left_out = "; ".join(
        f"{len(paths)} {what}: {_names(paths, folder)}" for paths, what in parts if paths
    )
    fix = next((f"; {path.name}: {refusal(path)}" for path in others if refusal(path)), "")
    if not known:
        raise InputError(
            f"--input {pattern!r} matches no files; a folder is searched for "
            f"{', '.join(FORMATS)}, compressed or not"
            + (f" ({left_out}{fix})" if left_out else "; correct it")
        )
    if left_out:
        _warn_left_out(pattern, left_out + fix)
    return known


def _files_of_glob(
    pattern: str, path: Path, skipped: Place | None, patterns: Sequence[str]
) -> list[Path]:
    parts = [part for part in path.parts if part != path.anchor]
    fixed = next((i for i, part in enumerate(parts) if _is_glob(part)), len(parts))
    if fixed == len(parts):
        raise InputError(f"--input {pattern!r} matches no files; {_advice(pattern, patterns)}")
    root = Path(path.anchor, *parts[:fixed])
    found = _Found(skipped=skipped)
    if _is_dir(root):
        _walk(root, parts[fixed:], found, ())
    _refuse_unusable(pattern, found)
    if not found.files:
        if found.folders:
            raise InputError(
                f"--input {pattern!r} matches {len(found.folders)} folders, such as "
                f"{min(found.folders)}, and no files; end it with '/**/*' to take the files in "
                "them, or name the folders themselves"
            )
        if found.hidden:
            raise InputError(
                f"--input {pattern!r} matches no files; what is hidden is left out "
                f"({_names(found.hidden, root)}): begin the pattern's last part with '.' to take it"
            )
        bracket = "; write a '[' that belongs to a name as '[[]'" if "[" in pattern else ""
        raise InputError(
            f"--input {pattern!r} matches no files; {_advice(pattern, patterns)} "
            f"(quote globs: '**' crosses folders){bracket}"
        )
    _leave_out_describing(pattern, root, found)
    literal = Path(pattern).suffix
    if not literal or GLOB_CHARACTERS & set(literal):
        _refuse_unknown(pattern, sorted(path for path in found.files if not is_known(path)))
    for file in sorted(found.files):
        _refuse_by_name(file)
    if found.lost:
        _warn_left_out(pattern, f"links that lead nowhere: {_names(found.lost, root)}")
    if found.circles:
        _warn_left_out(pattern, f"folders linked in a circle: {_names(found.circles, root)}")
    if found.folders and "**" not in parts:
        _warn_left_out(
            pattern,
            f"{len(found.folders)} folders that it matches: {_names(found.folders, root)}; name "
            "the folders themselves to enter them",
        )
    return found.files


def _leave_out_describing(pattern: str, root: Path, found: _Found) -> None:
    """Leaves out what describes a data set, unless nothing else matches or it is named."""
    describing = [path for path in found.files if path.name in DESCRIBING]
    others = [path for path in found.files if path not in describing]
    if describing and others and Path(pattern).name not in DESCRIBING:
        found.files = others
        _warn_left_out(
            pattern, f"{len(describing)} that describe a data set: {_names(describing, root)}"
        )


def _advice(pattern: str, patterns: Sequence[str]) -> str:
    """What helps where a pattern matches nothing: most often it was written for something else."""
    whole = _torn_apart(pattern, patterns)
    if whole:
        return f'quote a name that holds blanks, inside a variable too: "{whole}"'
    return odd_name(pattern) or "correct it"


def _torn_apart(pattern: str, patterns: Sequence[str]) -> str | None:
    """The name with blanks in it that patterns from `pattern` on are the pieces of, if such a file
    or folder is there."""
    start = patterns.index(pattern)
    for end in range(start + 2, len(patterns) + 1):
        whole = " ".join(patterns[start:end])
        parts = Path(home_expanded(whole, "--input")).parts
        fixed = Path(*itertools.takewhile(lambda part: not _is_glob(part), parts))
        if " " in str(fixed) and _exists(fixed):
            return f"'{whole}'"
    return None


def _one_file(path: Path) -> Path:
    found = _Found()
    _sort_in(path, found)
    _refuse_unusable(str(path), found)
    _refuse_by_name(path)
    _refuse_no_text(path)
    return path


def _refuse_no_text(path: Path) -> None:
    """Raises InputError for a model, a run and tokens, whose records are no documents."""
    if is_no_text(path):
        raise InputError(
            f"--input {path}: is {what_is(path)}, and no text; name the files or folders of text"
        )


def _walk(folder: Path, parts: Sequence[str], found: _Found, above: tuple[Place, ...]) -> None:
    """Adds what below `folder` matches the components `parts` of a glob.

    `above` are the folders that were entered on the way.
    """
    part, rest = parts[0], parts[1:]
    if not _is_glob(part):
        path = folder / part
        if rest and _is_dir(path):
            _walk(path, rest, found, above)
        elif not rest and _exists(path):
            _sort_in(path, found)
        return
    place = _place(folder)
    if place in above:
        found.circles.append(folder)
        return
    if place == found.skipped and above:
        return
    entries = _entries(folder)
    if part == "**":
        if rest:
            _walk(folder, rest, found, above)
        for entry in entries:
            path = folder / entry.name
            if not _is_folder(entry):
                if not rest and not entry.name.startswith("."):
                    _sort_in(path, found)
                elif rest:
                    _note_lost(path, entry, found)
            elif not entry.name.startswith("."):
                _walk(path, parts, found, (*above, place))
        return
    for entry in entries:
        path = folder / entry.name
        if not fnmatchcase(entry.name, part):
            continue
        if entry.name.startswith(".") and not part.startswith("."):
            found.hidden.append(path)
        elif not rest:
            _sort_in(path, found)
        elif _is_folder(entry):
            _walk(path, rest, found, (*above, place))
        else:
            _note_lost(path, entry, found)


def _note_lost(path: Path, entry: os.DirEntry[str], found: _Found) -> None:
    """Notes a link that leads nowhere where it may stand for a folder, as on a disk that is not
    mounted."""
    if entry.is_symlink() and not path.suffix and not path.exists():
        found.lost.append(path)


def _sort_in(path: Path, found: _Found) -> None:
    try:
        if path.is_file():
            found.files.append(path)
        elif path.is_dir():
            found.folders.append(path)
        elif path.is_symlink() and not path.exists():
            found.broken.append(path)
        else:
            found.special.append(path)
    except OSError as error:
        raise InputError(f"--input {path}: {failure(error)}") from None


def _refuse_unusable(pattern: str, found: _Found) -> None:
    if found.broken:
        first = min(found.broken)
        raise InputError(
            f"--input {pattern!r}: {len(found.broken)} links lead nowhere, such as {first} -> "
            f"{first.readlink()}; fetch what they stand for (`git annex get`, or the download "
            "again), or remove them"
        )
    if found.special:
        raise InputError(
            f"--input {min(found.special)} is a pipe or a device, which cannot be read twice; "
            "write its content to a file"
        )


def _refuse_unknown(pattern: str, unknown: Sequence[Path]) -> None:
    if unknown:
        reason = refusal(unknown[0])
        raise InputError(
            f"--input {pattern!r} matches {len(unknown)} files of unknown format, such as "
            f"{unknown[0]}{f' ({reason})' if reason else ''}; end the pattern with the wanted "
            "suffix ('**/*.md' reads each file as one document)"
        )


def _refuse_by_name(path: Path) -> None:
    reason = refusal(path)
    if reason:
        raise InputError(f"--input {path}: {reason}")


def _warn_left_out(pattern: str, what: str) -> None:
    logger.warning(f"--input {pattern}: left out {what}")


def _warn_of_doubles(files: Sequence[Path]) -> None:
    """Says which files lie under two names and so are read twice."""
    first: dict[Place, Path] = {}
    doubles: list[tuple[Path, Path]] = []
    for path in files:
        known = first.setdefault(_place(path), path)
        if known is not path:
            doubles.append((known, path))
    if doubles:
        one, other = doubles[0]
        logger.warning(
            f"{len(doubles)} of {len(files)} input files are read twice, under two names of one "
            f"file, such as {one} and {other}; leave one out of --input if that is not meant"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"--input: folder {folder} cannot be searched: {failure(error)}") from None


def _place(path: Path) -> Place:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"--input {path}: {failure(error)}") from None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise InputError(f"--input {path}: {failure(error)}") from None


def _exists(path: Path) -> bool:
    """Whether there is something of this name, be it a link that leads nowhere."""
    try:
        return path.is_symlink() or path.exists()
    except (OSError, ValueError) as error:
        fix = failure(error) if isinstance(error, OSError) else f"{error}; correct it"
        raise InputError(f"--input {path}: {fix}") from None


def _is_glob(part: str) -> bool:
    return bool(GLOB_CHARACTERS & set(part))


def _names(paths: Sequence[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in paths[:NAMED]]
    return ", ".join(names) + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")
