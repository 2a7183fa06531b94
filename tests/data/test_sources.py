"""Documents of every input format, and errors that name file and line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.domain_names import domain_name
from data.errors import InputError
from data.find import find_files
from data.sources import Document, Fields, iterate_documents

Compress = Callable[[bytes], bytes]

META = {"redpajama_set_name": "RedPajamaC4"}
LINE = json.dumps({"text": "one two", "meta": META}).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(path: Path, **fields: Any) -> list[Document]:
    return list(iterate_documents(path, Fields(**fields)))


@pytest.mark.parametrize("end", [b"\n", b"", b"\n\n"])
@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".jsonl", bytes), (".jsonl.zst", zstandard.compress), (".jsonl.gz", gzip.compress)],
)
def test_json_lines(tmp_path: Path, suffix: str, compress: Compress, end: bytes) -> None:
    path = write(tmp_path / f"a{suffix}", compress(LINE + b"\n\n" + LINE + end))
    assert read(path) == [Document("one two", "c4", path, 1), Document("one two", "c4", path, 3)]


def test_lines_longer_than_a_read_block(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y", "z" * (1 << 20)]
    lines = [json.dumps({"text": text, "meta": META}) for text in texts]
    path = write(tmp_path / "a.jsonl.zst", zstandard.compress("\n".join(lines).encode()))
    assert [document.text for document in read(path)] == texts


def test_several_zstd_frames_are_one_file(tmp_path: Path) -> None:
    frame = zstandard.compress(LINE + b"\n")
    assert len(read(write(tmp_path / "a.jsonl.zst", frame * 3))) == 3


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"content": ["a", "b"], "info": [{"name": "X"}] * 2, "n": [1, 2]})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    documents = read(path, text="content", domain="info.name")
    assert documents == [Document("a", "x", path, 1), Document("b", "x", path, 2)]
    with pytest.raises(InputError, match=r"a\.parquet:1: .*keys present: content, info, n"):
        read(path, text="text", domain="folder")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="truncated or damaged"):
        read(path)


def test_plain_text_is_one_document_of_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "My Docs" / "a.md", "# Títle\n".encode())
    assert read(path) == [Document("# Títle\n", "my-docs", path, 1)]
    packed = write(tmp_path / "My Docs" / "a.txt.gz", gzip.compress(b"hello"))
    assert read(packed)[0].text == "hello"
    assert read(write(tmp_path / "empty.py", b"")) == []
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 2"):
        read(write(tmp_path / "bad.txt", b"ab\xff"))
    with pytest.raises(InputError, match="--domain-field folder"):
        read(path, domain="meta.name")


def test_domain_rules(tmp_path: Path) -> None:
    record = {"text": "t", "meta": META | {"pile_set_name": "Wikipedia (en)"}, "lang": "EN"}
    path = write(tmp_path / "News" / "a.jsonl", json.dumps(record).encode())
    assert read(path)[0].domain == "c4"
    assert read(path, domain="meta.pile_set_name")[0].domain == "wikipedia-en"
    assert read(path, domain="lang")[0].domain == "en"
    assert read(path, domain="folder")[0].domain == "news"


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("RedPajamaC4", "c4"),
        ("RedPajamaCommonCrawl", "commoncrawl"),
        ("RedPajamaStackExchange", "stackexchange"),
        ("Pile-CC", "pile-cc"),
        ("RedPajama", "redpajama"),
        ("../x", "x"),
        ("...", ""),
    ],
)
def test_domain_names(name: str, domain: str) -> None:
    assert domain_name(name) == domain


@pytest.mark.parametrize(
    ("record", "fields", "named"),
    [
        ({"text": "t", "meta": {"x": 1}, "y": 2}, {}, "keys present: text, meta.x, y; .*--domain-"),
        ({"text": "t", "meta": {"redpajama_set_name": None}}, {}, "no domain under"),
        ({"text": "t", "meta": {"redpajama_set_name": "??"}}, {}, "no domain under"),
        (
            {"body": "t", "meta": META},
            {},
            "no text under 'text', .*keys present: body.*--text-field",
        ),
        ({"text": 5, "meta": META}, {}, "no text under 'text'"),
        ({"text": "t"}, {"domain": "a.b"}, "no domain under 'a.b'"),
        ([1, 2], {}, "expected a record"),
    ],
)
def test_record_without_text_or_domain_names_line_keys_and_flag(
    tmp_path: Path, record: object, fields: dict[str, str], named: str
) -> None:
    first = json.dumps({"text": "t", "meta": META, "a": {"b": "c"}})
    path = write(tmp_path / "a.jsonl", f"{first}\n{json.dumps(record)}\n".encode())
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{named}"):
        read(path, **fields)


@pytest.mark.parametrize("line", [b'{"text": ', b"not json", b'{"text": "\xff"}', b"[" * 100_000])
def test_bad_line_names_path_and_line(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "a.jsonl", LINE + b"\n" + line + b"\n" + LINE)
    with pytest.raises(InputError, match=r"a\.jsonl:2: not (valid JSON|UTF-8)"):
        read(path)


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
@pytest.mark.parametrize(
    ("suffix", "compress"), [(".jsonl.zst", zstandard.compress), (".jsonl.gz", gzip.compress)]
)
def test_truncated_file_is_refused(
    tmp_path: Path, suffix: str, compress: Compress, keep: float
) -> None:
    lines = [json.dumps({"text": f"{i * 7919}", "meta": META}) for i in range(2000)]
    content = compress("\n".join(lines).encode())
    path = write(tmp_path / f"a{suffix}", content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=rf"{path.name} .*truncated or damaged.*download it again"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl.zst", b"", "empty"),
        ("a.jsonl.zst", b"Entry not found", "damaged"),
        ("a.jsonl.zst", zstandard.compress(b""), "no documents"),
        ("a.jsonl", b"\n \n", "no documents"),
        ("a.parquet", b"", "damaged"),
    ],
)
def test_file_without_documents_is_refused(
    tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    with pytest.raises(InputError, match=rf"{name} .*{named}"):
        read(write(tmp_path / name, content))


def test_empty_texts_are_left_out_but_count_as_documents(tmp_path: Path) -> None:
    line = json.dumps({"text": "", "meta": META}).encode()
    assert read(write(tmp_path / "a.jsonl", line)) == []


def test_half_surrogate_pairs_become_replacement_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "a.jsonl", b'{"text": "a\\ud800b \\ud83d\\ude42"}')
    assert read(path, domain="folder")[0].text == "a\ufffdb \U0001f642"


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl", "a.txt", "a.parquet"])
def test_progress_adds_up_to_the_size_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        texts = [str(i) for i in range(3000)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        lines = b"\n".join([b"prose" if name.endswith("txt") else LINE] * 50_000)
        path.write_bytes(zstandard.compress(lines) if name.endswith("zst") else lines)
    steps: list[int] = []
    for _ in iterate_documents(path, Fields(domain="folder"), steps.append):
        pass
    assert sum(steps) == path.stat().st_size and min(steps) >= 0


def test_find_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.jsonl", "b/1.jsonl.zst", "a/x.md", "a/y.txt", "a/z.bin"):
        write(tmp_path / name, b"x")
    monkeypatch.chdir(tmp_path)

    def names(*patterns: str) -> list[str]:
        return [str(path) for path in find_files(patterns)]

    assert names("b/*", "**/*.jsonl") == ["b/1.jsonl.zst", "b/2.jsonl"]
    assert names(".") == ["a/y.txt", "b/1.jsonl.zst", "b/2.jsonl"]
    assert names("**/*.md") == ["a/x.md"]
    assert names("a/z.bin") == ["a/z.bin"]
    with pytest.raises(InputError, match=r"'\*\.jsonl' matches no files"):
        names("*.jsonl")
    with pytest.raises(InputError, match=r"2 files of unknown format, such as a/x\.md"):
        names("a/*")
