"""Every way in which tests damage a file, and what a reader makes of it."""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from data.errors import InputError

SECONDS_UNTIL_HUNG = 2.0
OTHER_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 7, 0.5, 10**30, float("nan"), float("inf")),
    *("", "x", "../../x", "\ud800", "\0", [], [1], ["x"], {}, {"x": 1}, {"x": {"x": [None]}}),
)
"""What a value of a JSON file is replaced by."""
DEEP = "[" * 20_000 + "]" * 20_000
MOST_ENTRIES = 2
"""Entries of a list, or of an object whose keys are data, that are mutated one by one."""
REPLACED = "\x00replaced\x00"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A file and the code that reads it."""

    name: str
    file: Path
    read: Callable[[], Any]
    """Reads the file as the program does; what it gives can be compared with ==."""
    flaw: Callable[[Any], str | None] = lambda value: None
    """What is wrong with a value that differs from the sound file's; None where it may be right."""
    checked: bool = False
    """Whether a checksum covers the content, so that no other value may come out."""
    form: str = "bytes"
    """"json" and "lines" are mutated key by key too."""
    pipes: bool = True
    """Whether a pipe may stand in its place; those of --input are left out where it is listed."""
    share: float = 1.0
    """Of the number of mutations of others; less for what takes long to read."""


@dataclass(slots=True)
class Outcome:
    """What became of all mutations of one file."""

    counts: Counter[str] = field(default_factory=Counter)
    """By "refused", "same" and "other"."""
    failures: dict[str, list[str]] = field(default_factory=dict)
    """Mutations by what went wrong."""

    @property
    def mutations(self) -> int:
        return self.counts.total() + sum(map(len, self.failures.values()))

    def describe(self) -> str:
        """A line for each kind of failure with its first mutations."""
        return "\n".join(
            f"{len(names)} x {what}; for example: {'; '.join(names[:3])}"
            for what, names in self.failures.items()
        )


class Hung(BaseException):
    """A reader took too long. No Exception, so that nobody who catches those hides it."""


def try_all(reader: Reader, seed: int, most: int) -> Outcome:
    """Reads the file of `reader` in `most` damaged forms, chosen by `seed`; leaves it as it was."""
    outcome = Outcome()
    content = reader.file.read_bytes()
    sound = reader.read()
    assert _equal(reader.read(), sound), "reading must be repeatable"
    rng = random.Random(f"{reader.name} {seed}")
    for name, place in _mutations(reader, content, rng, round(most * reader.share)):
        with _undone(reader.file, content):
            place(reader.file)
            result = attempt(reader.read)
        if isinstance(result, str):
            outcome.failures.setdefault(result, []).append(name)
            continue
        kind, value = result
        if kind == "read":
            kind = "same" if _equal(value, sound) else "other"
        flaw = "another value than was written" if reader.checked else None
        if kind == "other":
            flaw = flaw or reader.flaw(value)
            if flaw is not None:
                outcome.failures.setdefault(f"wrong value: {flaw}", []).append(name)
                continue
        outcome.counts[kind] += 1
    assert _equal(reader.read(), sound), "the file was put back"
    return outcome


def attempt(read: Callable[[], Any]) -> tuple[str, Any] | str:
    """("read", the value) or ("refused", None); a text says what went wrong instead."""
    previous = signal.signal(signal.SIGALRM, _hung)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_UNTIL_HUNG)
    try:
        return "read", read()
    except InputError as error:
        return _refused(str(error))
    except Hung:
        return "hangs"
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__} at {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _refused(message: str) -> tuple[str, Any] | str:
    if not message.strip():
        return "refused without a message"
    if len(message) > 2000:
        return f"refused in {len(message):,} characters: {message[:80]!r}"
    return "refused", None


def _hung(number: int, frame: FrameType | None) -> None:
    raise Hung


def _place(error: BaseException) -> str:
    """The last lines of ours that an exception passed through."""
    root = str(Path(__file__).resolve().parents[2])
    frames = [
        f"{Path(frame.filename).relative_to(root)}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(root) and "/tests/" not in frame.filename
    ]
    return " > ".join(frames[-2:]) or "the test"


def _equal(left: Any, right: Any) -> bool:
    return bool(left == right)


@contextlib.contextmanager
def _undone(path: Path, content: bytes) -> Iterator[None]:
    """Puts the file back as it was."""
    beside = {entry.name for entry in path.parent.iterdir()}
    try:
        yield
    finally:
        _remove(path)
        for entry in path.parent.iterdir():
            if entry.name not in beside:
                _remove(entry)
        path.write_bytes(content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(0o700)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


Mutation = tuple[str, Callable[[Path], Any]]


def _mutations(reader: Reader, content: bytes, rng: random.Random, most: int) -> list[Mutation]:
    """The mutations of the whole file, and of the others up to `most`."""
    always = [*places(reader.pipes), *_writings(changed_whole(content))]
    keys: list[Mutation] = []
    if reader.form == "json":
        keys += _writings((name, text.encode()) for name, text in changed_keys(json.loads(content)))
    if reader.form == "lines":
        keys += _writings(_changed_lines(content))
    number = max(0, most - len(always))
    keys = rng.sample(keys, min(len(keys), number if len(keys) <= number else number * 2 // 3))
    return [*always, *keys, *_writings(changed_bytes(content, rng, number - len(keys)))]


def _writings(changes: Iterable[tuple[str, bytes]]) -> Iterator[Mutation]:
    return ((name, _writing(changed)) for name, changed in changes)


def _writing(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def places(pipes: bool = True) -> Iterator[Mutation]:
    """Something else than a readable file."""

    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    yield "missing", replaced(lambda path: None)
    yield "a folder", replaced(lambda path: path.mkdir())
    yield "a folder with a file", replaced(_folder_with_a_file)
    yield "a dangling link", replaced(lambda path: path.symlink_to(path.with_name("nowhere")))
    yield "a link to itself", replaced(lambda path: path.symlink_to(path.name))
    if pipes:
        yield "a FIFO", replaced(_fifo)
    if os.geteuid() != 0:  # root may read everything
        yield "permission denied", lambda path: path.chmod(0)


def _fifo(path: Path) -> None:
    os.mkfifo(path)

    def release() -> None:
        # Code that is not Python's waits on after a signal; a writer that leaves ends its wait.
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    timer = threading.Timer(SECONDS_UNTIL_HUNG, release)
    timer.daemon = True
    timer.start()


def _folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("{}")


def changed_whole(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Changes of the whole content."""
    yield "empty", b""
    yield "only spaces", b"  \n\n"
    yield "zeros", bytes(len(content))
    yield "doubled", content + content
    yield "a byte-order mark", b"\xef\xbb\xbf" + content
    yield "UTF-16", content.decode("latin-1").encode("utf-16")
    yield "Windows line ends", content.replace(b"\n", b"\r\n")
    yield "a NUL at the end", content + b"\0"
    yield "garbage at the end", content + b"}]garbage"
    for value in (b"null", b"[]", b"{}", b"0", b'"x"', b"true", b"NaN", b"9" * 5000, DEEP.encode()):
        yield f"only {value[:10].decode()}", value


def changed_bytes(content: bytes, rng: random.Random, number: int) -> Iterator[tuple[str, bytes]]:
    """Changes of `number` single bytes and pieces."""
    for index in range(number):
        place = rng.randrange(max(1, len(content)))
        changed = bytearray(content)
        kind = ("flip", "cut", "insert", "delete", "overwrite")[index % 5]
        if kind == "flip" and content:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del changed[place:]
        elif kind == "insert":
            changed[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "delete":
            del changed[place : place + rng.randrange(1, 9)]
        else:
            changed[place : place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"9999"))
        yield f"{kind} at byte {place:,} of {len(content):,}", bytes(changed)


def changed_keys(value: Any) -> Iterator[tuple[str, str]]:
    """A JSON text for every value in `value` replaced by every other, and for every key removed."""
    for path in _paths(value):
        where = ".".join(map(str, path)) or "everything"
        for other in OTHER_VALUES:
            text = json.dumps(_with(value, path, other))
            yield f"{where} = {json.dumps(other)}", text
        if len(path) == 1:
            deep = json.dumps(_with(value, path, REPLACED)).replace(json.dumps(REPLACED), DEEP)
            yield f"{where} = deeply nested", deep
        if path:
            yield f"{where} removed", json.dumps(_with(value, path))


def _changed_lines(content: bytes) -> Iterator[tuple[str, bytes]]:
    lines = content.decode().splitlines()
    for number in sorted({0, len(lines) // 2, len(lines) - 1}):
        for name, text in changed_keys(json.loads(lines[number])):
            changed = [*lines[:number], text, *lines[number + 1 :]]
            yield f"line {number + 1}: {name}", "\n".join(changed).encode() + b"\n"


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), MOST_ENTRIES)):
            yield from _paths(value[index], (*path, index))


def _with(value: Any, path: tuple[Any, ...], *other: Any) -> Any:
    """A copy of `value` in which `other` stands at `path`; without `other` nothing does."""
    if not path:
        return other[0]
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if len(path) > 1:
        copy[path[0]] = _with(value[path[0]], path[1:], *other)
    elif other:
        copy[path[0]] = other[0]
    else:
        del copy[path[0]]
    return copy
