"""Records with marks in front of them, and several on one line."""

import json
import subprocess
from pathlib import Path

import pytest

from data.errors import InputError
from data.joined import SEPARATED
from data.sources import Fields, iterate_documents

FIELDS = Fields(domain="folder")
RECORDS = [json.dumps({"text": text}).encode() for text in ("one", "\x1etwo", "three")]


def texts(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [document.text for document in iterate_documents(path, FIELDS)]


@pytest.mark.parametrize(
    "content",
    [
        b"".join(b"\x1e" + record + b"\n" for record in RECORDS),
        b"\xef\xbb\xbf\x1e\x1e" + b"\r\n\x1e".join(RECORDS),
        b"\x1e\n".join(RECORDS) + b"\x1e",
    ],
    ids=["RFC 7464", "mark, empty texts", "behind records"],
)
def test_json_text_sequences_are_read(tmp_path: Path, content: bytes) -> None:
    assert texts(tmp_path / "a.json", content) == ["one", "\x1etwo", "three"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1e" + b"\x1e".join(RECORDS) + b"\n", r"a\.json:1: 3 records on one line"),
        (
            b"".join(b"\x1e{\n" + record[1:] + b"\n" for record in RECORDS),
            r"a\.json:1: not valid JSON .* one record a line is wanted: tr -d",
        ),
    ],
    ids=["no line ends", "several lines"],
)
def test_sequences_of_another_layout_are_refused_with_advice_that_works(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        texts(tmp_path / "a.json", content)
    assert SEPARATED in str(caught.value)
    advice = SEPARATED.replace("OLD", "a.json").replace("NEW.jsonl", "b.jsonl")
    subprocess.run(advice, shell=True, cwd=tmp_path, check=True)
    found = [document.text for document in iterate_documents(tmp_path / "b.jsonl", FIELDS)]
    assert found == ["one", "\x1etwo", "three"]


@pytest.mark.parametrize("blank", ["\xa0", "\x1d", "\f", "\u2003"])
def test_one_record_behind_what_is_no_blank_of_json_is_not_called_several(
    tmp_path: Path, blank: str
) -> None:
    with pytest.raises(InputError, match=r"a\.json:1: not valid JSON"):
        texts(tmp_path / "a.json", blank.encode() + RECORDS[0])
