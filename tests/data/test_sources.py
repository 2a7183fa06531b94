"""Documents of every input format, and errors that name file and line."""

import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data.errors import InputError
from data.sources import Document, Fields, iterate_documents, warn_of_folders_with_one_name

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
    ("record", "fields", "named"),
    [
        ({"text": "t", "meta": {"x": 1}, "y": 2}, {}, "keys present: text, meta.x, y; .*--domain-"),
        ({"text": "t", "meta": {"redpajama_set_name": None}}, {}, "no domain under"),
        ({"text": "t", "meta": {"redpajama_set_name": "??"}}, {}, "no domain under"),
        (
            {"body": "t", "meta": META},
            {},
            "no text under 'text'; keys present: body.*--text-field",
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
        ("a.jsonl.zst", b"Entry not found", "not compressed"),
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


def test_a_long_number_in_another_field_is_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "kept", "n": 1%s, "d": 7}\n' % ("0" * 5000))
    (document,) = iterate_documents(path, Fields(domain="d"))
    assert (document.text, document.domain) == ("kept", "7")
    with pytest.raises(InputError, match=r"a\.jsonl:1: no domain under 'n', which is a number"):
        list(iterate_documents(path, Fields(domain="n")))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": "one", "text": "two", "meta": {"redpajama_set_name": "x"}}', "'text'"),
        (
            b'{"text": "a", "meta": {"redpajama_set_name": "x", "redpajama_set_name": "y"}}',
            "'meta.redpajama",
        ),
        (b'{"text": "a", "meta": {"redpajama_set_name": "x"}, "meta": {}}', "'meta.redpajama"),
    ],
)
def test_a_field_that_is_given_twice_is_refused(tmp_path: Path, line: bytes, named: str) -> None:
    path = write(tmp_path / "a.jsonl", LINE + b"\n" + line)
    with pytest.raises(InputError, match=rf"a\.jsonl:2: {named}.* is given twice"):
        read(path)


def test_what_is_given_twice_and_is_no_matter(tmp_path: Path) -> None:
    """Other fields, and equal values."""
    line = b'{"url": "x", "text": "a", "text": "a", "url": "y", "n": ' + b"9" * 5000 + b"}"
    assert [d.text for d in read(write(tmp_path / "a.jsonl", line), domain="folder")] == ["a"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in ("first", "second", "x")]
    for names in (["text", "text", "kind"], ["kind", "text", "kind"]):
        table = pyarrow.Table.from_arrays(columns, names=names)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet: 2 columns are named .*; rename"):
            list(iterate_documents(tmp_path / "a.parquet", Fields(domain="kind")))
    table = pyarrow.Table.from_arrays(columns, names=["other", "other", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    documents = iterate_documents(tmp_path / "a.parquet", Fields(domain="folder"))
    assert [document.text for document in documents] == ["x"]


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


@pytest.mark.parametrize("name", ["A.JSONL", "b.jl", "c.jsonlines", "d.NdJson", "e.JSONL.GZ"])
def test_json_lines_under_any_of_its_suffixes(tmp_path: Path, name: str) -> None:
    content = gzip.compress(LINE) if name.endswith("GZ") else LINE
    assert [document.text for document in read(write(tmp_path / name, content))] == ["one two"]


@pytest.mark.parametrize("name", ["a.bak", "a.txt", "part-00000", "a.jsonl.1"])
def test_json_lines_under_a_suffix_of_plain_text_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"\n" + LINE + b"\n" + LINE)
    with pytest.raises(InputError, match=r"holds JSON records.*as (a|part-00000)\.jsonl"):
        read(path)
    # Braces alone do not make records.
    assert read(write(tmp_path / "x.json5", b'{"a": 1}\n'))[0].text == '{"a": 1}\n'


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    # The second one comes of two files that were joined.
    path = write(tmp_path / "a.jsonl", mark + LINE + b"\n" + mark + LINE)
    assert [document.text for document in read(path)] == ["one two"] * 2
    assert read(write(tmp_path / "d" / "a.txt", mark + b"x\r\n"))[0].text == "x\r\n"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'[{"text": "a"}]', "expected a record .* a list; .*jq -c"),
        (b'[\n{"text": "a"}\n]', "jq -c"),
        (b'{\n "text": "a"\n}', "jq -c"),
        (b"true", "true or false"),
        (b"<!DOCTYPE html><html>", "holds a web page, not JSON Lines"),
        (gzip.compress(b"x", mtime=0), r"holds gzip data, not JSON Lines; give it the suffix \.gz"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16.*iconv"),
        ('{"text": "a"}'.encode("utf-16-be"), "UTF-16.*iconv"),
    ],
)
def test_what_is_no_json_lines_is_called_what_it_is(
    tmp_path: Path, content: bytes, named: str
) -> None:
    with pytest.raises(InputError, match=rf"a\.jsonl.*{named}"):
        read(write(tmp_path / "a.jsonl", content))


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_wide_text_is_refused_even_where_it_is_valid_utf_8(tmp_path: Path, codec: str) -> None:
    with pytest.raises(InputError, match=r"a\.txt holds UTF-16 text, not plain text; .*iconv"):
        read(write(tmp_path / "a.txt", "plain words".encode(codec)))
    assert read(write(tmp_path / "zeros.txt", b"\0" * 100))[0].text == "\0" * 100


@pytest.mark.parametrize(
    ("record", "fields", "named"),
    [
        ({"text": None}, {}, "'text', which is null; .*--skip-incomplete"),
        ({"text": ["a"]}, {}, "'text', which is a list"),
        ({"m": [{"c": "a"}]}, {"text": "m.0.c"}, r"'m' is a list.*jq -c '\.text = \.m\[0\]\.c'"),
        ({"m": [{"c": "a"}]}, {"text": "m.c"}, r"\.text = \(\[\.m\[\]\.c\] \| join"),
        ({"text": 5}, {}, "'text', which is a whole number"),
        ({"text": "a", "k": None}, {"domain": "k"}, "'k', which is null"),
        ({"text": "a", "k": {}}, {"domain": "k"}, "'k', which is an object"),
        ({"text": "a", "k": float("nan")}, {"domain": "k"}, "'k', which is a number"),
        ({"text": "a", "k": "??"}, {"domain": "k"}, r"'\?\?' holds no letter"),
        ({"text": "a", "k": "x" * 300}, {"domain": "k"}, "300 letters"),
        ({"text": "a", "meta": "{}"}, {"domain": "meta.x"}, "'meta' is text, not an object"),
    ],
)
def test_unfit_values_are_told_from_absent_ones(
    tmp_path: Path, record: dict[str, Any], fields: dict[str, str], named: str
) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(record).encode())
    with pytest.raises(InputError, match=rf"a\.jsonl:1: no (text|domain) under .*{named}|{named}"):
        read(path, **({"domain": "folder"} | fields))


@pytest.mark.parametrize(
    ("value", "domain"),
    [(3, "3"), (-1, "minus-1"), (2.0, "2.0"), (True, "true"), ("Новости", "новости")],
)
def test_labels_become_domains(tmp_path: Path, value: object, domain: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "t", "label": value}).encode())
    assert read(path, domain="label")[0].domain == domain


def test_a_dotted_name_is_a_key_or_a_path(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"a.b.c": "whole", "a": {"b": {"c": "inner"}}},
        {"a": {"b.c": "half"}},
        {"a.b": {"c": "other half"}, "a": {}},
        {"a": {"b": {"c": "path"}}},
    ]
    lines = "\n".join(json.dumps(record | {"d.e": "D"}) for record in records)
    documents = read(write(tmp_path / "a.jsonl", lines.encode()), text="a.b.c", domain="d.e")
    assert [document.text for document in documents] == ["whole", "half", "other half", "path"]
    assert {document.domain for document in documents} == {"d"}


def test_incomplete_records_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    lines = [
        {"text": None, "meta": META},
        {"text": "kept", "meta": META},
        {"meta": META},
        {"text": "x", "meta": {}},
        {"text": "", "meta": META},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)).encode())
    left_out: list[tuple[int, str]] = []
    fields = Fields(skip_incomplete=True)
    documents = list(iterate_documents(path, fields, left_out=lambda *one: left_out.append(one)))
    assert [document.text for document in documents] == ["kept"]
    assert left_out == [(row, "no text or domain") for row in (1, 3, 4)]
    # A value that is there and is no text stays an error.
    wrong = write(tmp_path / "b.jsonl", b'{"text": 5}')
    with pytest.raises(InputError, match="a whole number"):
        read(wrong, domain="folder", skip_incomplete=True)


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_values_of_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    meta = [META]
    for columns in (
        {"text": ["é"], "meta": meta},
        {"text": ["é".encode()], "meta": meta},
        {"text": ["é"], "meta.redpajama_set_name": ["RedPajamaC4"]},
        {"text": ["é"], "meta.redpajama_set_name": [b"RedPajamaC4"], "meta": [{"x": 1}]},
        {
            "text": pyarrow.array(["é"]).dictionary_encode(),
            "meta": pyarrow.array(
                [list(META.items())], pyarrow.map_(pyarrow.string(), pyarrow.string())
            ),
        },
    ):
        assert read(write_parquet(path, columns)) == [Document("é", "c4", path, 1)]
    with pytest.raises(InputError, match=r"a\.parquet:1: 'text' is bytes that are not UTF-8"):
        read(write_parquet(path, {"text": [b"\xff"], "meta": meta}))
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    )
    with pytest.raises(InputError, match=r"a\.parquet: a text behind row 0 is not UTF-8"):
        read(write_parquet(path, {"text": broken, "meta": meta}))


def test_parquet_without_rows_is_sound(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array([], "string")})) == []
    (tmp_path / "b.parquet").write_bytes(gzip.compress(b"x"))
    with pytest.raises(InputError, match="holds gzip data, not parquet"):
        read(tmp_path / "b.parquet")


def test_a_record_above_the_limit_is_refused_before_it_is_held(tmp_path: Path) -> None:
    # 3 GB of one line, in 300 kB.
    frame = zstandard.compress(b"x" * (30 << 20))
    path = write(tmp_path / "a.jsonl.zst", zstandard.compress(LINE + b"\n") + frame * 100)
    with pytest.raises(InputError, match=r"a\.jsonl\.zst:2: one record of more than 64 MiB"):
        read(path)
    long = write(tmp_path / "b.jsonl", LINE + b"\n" + LINE + b" " * 2_000_000)
    with pytest.raises(InputError, match=r"b\.jsonl:2: .* 1 MiB.*--max-record-mib"):
        read(long, max_bytes=1 << 20)
    assert len(read(long)) == 2
    array = write(tmp_path / "array.json", b"[" + LINE * 20_000 + b"]")
    with pytest.raises(InputError, match=r"array\.json is one JSON array; .*jq -c"):
        read(array, max_bytes=1 << 20)
    with pytest.raises(InputError, match=r"c\.txt: one record of more than 1 MiB"):
        read(write(tmp_path / "c.txt", b"x" * 1_100_000), max_bytes=1 << 20)
    rows = {"text": ["a", "x" * 1_100_000], "meta": [META] * 2}
    with pytest.raises(InputError, match=r"d\.parquet:2: one record of more than 1 MiB"):
        read(write_parquet(tmp_path / "d.parquet", rows), max_bytes=1 << 20)


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / os.fsdecode(b"caf\xe9") / "a.jsonl", LINE)
    with pytest.raises(InputError, match=r"the name of its folder is not UTF-8.*rename"):
        read(path, domain="folder")
    assert read(path)[0].domain == "c4"
    # As a locale that is not UTF-8 shows the name of a folder.
    name = "é".encode().decode("latin-1")
    monkeypatch.setattr("data.domain_names.os.fsencode", lambda name: name.encode("latin-1"))
    assert read(write(tmp_path / name / "b.jsonl", LINE), domain="folder")[0].domain == "é"
    assert read(write(tmp_path / "è" / "b.jsonl", LINE), domain="folder")[0].domain == "è"


def test_the_domain_of_a_link_is_the_folder_it_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = write(tmp_path / "blobs" / "aa", b"words")
    link = tmp_path / "snap" / "News" / "a.txt"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    (tmp_path / "all").symlink_to(tmp_path / "blobs")
    assert read(link)[0].domain == "news" and read(link)[0].name == "News"
    assert read(tmp_path / "all" / "aa")[0].domain == "all"
    monkeypatch.chdir(link.parent)
    assert read(Path("a.txt"))[0].domain == "news"


def test_records_joined_on_one_line_are_called_so(tmp_path: Path) -> None:
    """As `cat` joins files of which one does not end its last line."""
    path = write(tmp_path / "a.jsonl", LINE + b"\n" + LINE + b" " + LINE + LINE + b"\n" + LINE)
    with pytest.raises(InputError, match=r"a\.jsonl:2: 3 records on one line.*jq -c \."):
        read(path)
    for line in (LINE + b",", LINE + b" x", b"1 2"):
        with pytest.raises(InputError, match=r"a\.jsonl:2: not valid JSON"):
            read(write(tmp_path / "a.jsonl", LINE + b"\n" + line))


def test_text_in_another_encoding_says_how_to_find_and_convert_it(tmp_path: Path) -> None:
    folder = tmp_path / "old books"
    content = "caf\u00e9 au lait\n".encode("latin-1")
    for name in ("a.txt", "b.txt"):
        write(folder / name, content)
    write(folder / "c.txt", "caf\u00e9".encode())
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 text \(byte 3.*iconv") as refused:
        read(folder / "a.txt")
    command = str(refused.value).partition("; grep")[2].partition(" lists all")[0]
    line = ["env", "LC_ALL=C.UTF-8", "sh", "-c", f"grep{command}"]
    found = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split("\n")
    assert sorted(found) == ["", str(folder / "a.txt"), str(folder / "b.txt")]
    with pytest.raises(InputError, match=r"iconv.*--input$"):
        read(write(tmp_path / "a.txt.gz", gzip.compress(content)))
    with pytest.raises(InputError, match=r"a\.jsonl:1: not UTF-8 text .*iconv"):
        read(write(tmp_path / "a.jsonl", b'{"text": "' + content.strip() + b'"}'))


def test_texts_of_other_names_can_be_brought_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"content": "t", "id": 1}')
    with pytest.raises(InputError, match=r"rename it with jq -c '\.text = \.KEY' OLD > NEW\.jsonl"):
        read(path)
    table = pyarrow.table({"content": ["t"], "id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="or rename it where other files do have 'text'"):
        read(tmp_path / "a.parquet")


def test_folders_of_one_name_that_make_one_domain_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / name for name in ("c4/data/a.jsonl", "github/data/b.jsonl", "data/c.txt")]
    warn_of_folders_with_one_name(paths, Fields())
    warn_of_folders_with_one_name(paths, Fields(domain="meta.source"))
    warn_of_folders_with_one_name([*paths[:1], paths[0].with_name("z")], Fields(domain="folder"))
    assert capsys.readouterr().err == ""
    others = [tmp_path / "x" / "en" / "a.txt", tmp_path / "y" / "en" / "b.txt"]
    warn_of_folders_with_one_name([*paths, *others], Fields(domain="folder"))
    said = capsys.readouterr().err
    assert "3 folders called 'data' make one domain" in said and "(and 1 more such" in said
    assert f"ln -s {tmp_path / 'c4' / 'data'} PARTS/NAME" in said
    warn_of_folders_with_one_name(others, Fields())
    assert "2 folders called 'en' make one domain" in capsys.readouterr().err
