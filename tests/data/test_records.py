"""The one reader of JSON: the right value, or InputError naming the place; never anything else."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import InputError, failure
from data.records import fits, parse_json, read_json, read_text


def test_reads_what_is_right(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"step": 3, "rate": 1, "n": None}).encode())
    keys: dict[str, Any] = {"step": int, "rate": float, "n": (str, type(None))}
    assert read_json(path, "x", keys=keys) == {"step": 3, "rate": 1, "n": None}
    assert read_text(path).startswith("{")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"step": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"step": 3, "step": 4}', "'step' is given twice, with different values"),
        (b'{"step": 3, "a": [{"b": 1, "b": null}]}', "'b' is given twice"),
        (b"[]", "a list, not an object"),
        (b"5", "a whole number, not an object"),
        (b"null", "null, not an object"),
        (b"{}", "`step` is missing"),
        (b'{"step": "3"}', "`step` is text, not a whole number"),
        (b'{"step": true}', "`step` is true or false"),
        (b'{"step": 3.0}', "`step` is a number, not a whole number"),
    ],
)
def test_names_what_is_wrong(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, "copy it again", keys={"step": int})
    message = str(caught.value)
    assert str(path) in message and words in message and "copy it again" in message


def test_any_damage_is_named(tmp_path: Path) -> None:
    """Bytes flipped, cut and repeated at random: the value, or InputError."""
    draw = np.random.default_rng(0)
    good = json.dumps({"step": 12, "names": ["a", "b"], "nested": {"x": 0.5}}).encode()
    path, refused = tmp_path / "a.json", 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(draw.integers(1, 4)):
            at = int(draw.integers(len(data)))
            data[at : at + int(draw.integers(3))] = draw.bytes(int(draw.integers(3)))
            if not data:
                break
        path.write_bytes(bytes(data))
        try:
            found = read_json(path, "x", keys={"step": int, "names": list, "nested": dict})
        except InputError:
            refused += 1
        else:
            assert isinstance(found["step"], int) and isinstance(found["names"], list)
    assert refused > 100


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder; make it"):
        read_text(tmp_path / "none", "make it")
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_text(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="round in a circle"):
        read_text(tmp_path / "loop")
    with pytest.raises(InputError, match="too long"):
        read_text(tmp_path / ("x" * 300))


def test_every_cause_has_words() -> None:
    for number in (errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EIO):
        words = failure(OSError(number, os.strerror(number)))
        assert ";" in words and "Errno" not in words
    assert failure(OSError(errno.EXDEV, "Cross-device link")) == "Cross-device link"
    assert failure(OSError()) == "OSError"
    assert failure(OSError("pipe broke"), "try again") == "pipe broke; try again"


def test_a_line_is_read_like_a_file() -> None:
    assert parse_json("[1]", "a.jsonl:3", "x", kind=list) == [1]
    with pytest.raises(InputError, match=r"a\.jsonl:3: holds an object, not a list"):
        parse_json("{}", "a.jsonl:3", "x", kind=list)


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (5, int, True),
        (True, int, False),
        (5, float, True),
        ([1, 2], [int], True),
        ([1, "x"], [int], False),
        ({}, [int], False),
        ({"a": 1, "b": "x"}, {"a": int}, True),
        ({"a": "x"}, {"a": int}, False),
        ({"b": 1}, {"a": int}, False),
        ({}, {"a?": int}, True),
        ({"a": None}, {"a?": int}, False),
        ({"x": {"loss": 1}}, {"*": {"loss": float}}, True),
        ({"x": 5}, {"*": {"loss": float}}, False),
        (None, {"a?": int}, False),
    ],
)
def test_forms(value: object, form: object, expected: bool) -> None:
    assert fits(value, form) == expected


def test_a_pipe_is_read_and_one_that_nobody_writes_into_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not valid JSON"):
        read_json(tmp_path / "pipe", "x")
    reading, writing = os.pipe()  # as the shell's <(...) gives
    os.write(writing, b'{"a": 1}')
    os.close(writing)
    assert read_json(Path(f"/dev/fd/{reading}"), "x") == {"a": 1}
    os.close(reading)
