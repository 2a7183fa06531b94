"""The demo's text: four domains out of this interpreter, distinct documents, the same each time."""

import io
import json
from pathlib import Path

import pytest
import zstandard

from data.errors import InputError
from launch.demo import text as demo_text

BYTES = 60_000


def read(path: Path) -> list[dict[str, dict[str, str]]]:
    with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as file:
        assert isinstance(file, io.TextIOBase)
        return [json.loads(line) for line in file]


def test_every_domain_is_filled_with_distinct_documents(tmp_path: Path) -> None:
    sizes = demo_text.collect(tmp_path, BYTES)
    assert list(sizes) == ["stdlib", "headers", "reference", "docs"]
    texts = []
    for domain, size in sizes.items():
        records = read(tmp_path / f"{domain}.jsonl.zst")
        assert {record["meta"]["domain"] for record in records} == {domain}
        assert BYTES <= size == sum(len(str(record["text"]).encode()) for record in records)
        assert len(records) >= 4
        texts += [str(record["text"]) for record in records]
    assert len(set(texts)) == len(texts)
    assert all(
        demo_text.SHORTEST_DOCUMENT <= len(text) <= demo_text.DOCUMENT_CHARACTERS for text in texts
    )


def test_selection_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        demo_text.collect(tmp_path / name, BYTES)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


def test_too_little_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "DOMAINS", {"empty": lambda: iter([("name", "x" * 500)])})
    with pytest.raises(InputError, match=r"only 500 bytes of 'empty' text"):
        demo_text.collect(tmp_path, BYTES)
