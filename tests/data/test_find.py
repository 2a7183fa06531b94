"""Files named by name, folder and glob: the same ones, and none left out in silence."""

import os
from pathlib import Path

import pytest

from data.errors import InputError
from data.find import find_files


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")


def names(*patterns: str) -> list[str]:
    return [str(path) for path in find_files(patterns)]


def test_find_files() -> None:
    write("b/2.jsonl", "b/1.jsonl.zst", "a/x.md", "a/y.txt", "a/z.bin")
    assert names("b/*", "**/*.jsonl") == ["b/1.jsonl.zst", "b/2.jsonl"]
    assert names(".") == ["a/y.txt", "b/1.jsonl.zst", "b/2.jsonl"]
    assert names("**/*.md") == ["a/x.md"]
    assert names("a/z.bin") == ["a/z.bin"]
    with pytest.raises(InputError, match=r"'\*\.jsonl' matches no files"):
        names("*.jsonl")
    with pytest.raises(InputError, match=r"2 files of unknown format, such as a/x\.md"):
        names("a/*")


def test_folder_and_glob_find_the_same_files() -> None:
    write("in/github/a.jsonl", "in/B.JSONL", "in/c.jl", "in/d.pq", "pool/c4/a.ndjson.GZ")
    write("in/.ipynb_checkpoints/a.jsonl", "in/.git/x.txt", "in/.hidden.jsonl")
    Path("in/c4").symlink_to("../pool/c4")
    found = names("in")
    assert found == ["in/B.JSONL", "in/c.jl", "in/c4/a.ndjson.GZ", "in/d.pq", "in/github/a.jsonl"]
    assert names("in/**/*") == names("in/**") == found
    assert names(str(Path("in").absolute())) == [str(Path(name).absolute()) for name in found]
    # A pattern that names what is hidden gets it.
    assert names("in/.git/*.txt", "in/.hidden.jsonl") == ["in/.git/x.txt", "in/.hidden.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("https://a.b/c.jsonl", "download it first"),
        ("s3://bucket/*.jsonl", "download it first"),
        ("{a,b}.jsonl", "leave braces outside the quotes"),
        ("$HOME/*.jsonl", "use double quotes"),
        ("a.jsonl,b.jsonl", r"separate names by spaces: a\.jsonl b\.jsonl$"),
        ("a.jsonl,c.jsonl", "matches no files; correct it$"),
    ],
)
def test_what_is_no_path_is_told_so(pattern: str, advice: str) -> None:
    write("a.jsonl", "b.jsonl")
    with pytest.raises(InputError, match=advice):
        names(pattern)


def test_a_glob_that_matches_hidden_files_alone_names_them() -> None:
    write("in/.a.jsonl", "in/.git/x.txt")
    for pattern, named in (("in/*.jsonl", r"\(\.a\.jsonl\)"), ("in/*", r"\.a\.jsonl, \.git")):
        with pytest.raises(InputError, match=rf"what is hidden is left out.*{named}.*'\.' to take"):
            names(pattern)
    assert names("in/.*.jsonl") == ["in/.a.jsonl"]
    with pytest.raises(InputError, match=r"matches no files; correct it"):
        names("in/*.txt")


def test_what_a_folder_leaves_out_is_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    write("in/a.jsonl", "in/README.md", "in/b.csv", "in/.gitattributes")
    assert names("in") == ["in/a.jsonl"]
    printed = capsys.readouterr().err
    assert "left out 2 of no known format: README.md, b.csv; 1 hidden: .gitattributes" in printed
    assert "b.csv: .csv is not read: " in printed
    write("tables/a.csv")
    with pytest.raises(InputError, match=r"'tables' matches no files; .*a\.csv: .*JSON Lines"):
        names("tables")


def test_links_in_a_circle_are_entered_once(capsys: pytest.CaptureFixture[str]) -> None:
    write("in/a/x.jsonl")
    Path("in/a/up").symlink_to("..")
    Path("in/self").symlink_to(".")
    for pattern in ("in", "in/**/*.jsonl"):
        assert names(pattern) == ["in/a/x.jsonl"]
        assert "circle: " in capsys.readouterr().err


def test_one_file_under_two_names_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    write("in/v2/x.jsonl", "in/y.jsonl")
    Path("in/latest").symlink_to("v2")
    assert names("in") == ["in/latest/x.jsonl", "in/v2/x.jsonl", "in/y.jsonl"]
    assert "such as in/latest/x.jsonl and in/v2/x.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["in", "in/*", "in/a.jsonl"])
def test_links_that_lead_nowhere_are_refused(pattern: str) -> None:
    write("in/b.jsonl")
    Path("in/a.jsonl").symlink_to("../objects/SHA256E-s1--aa")
    with pytest.raises(InputError, match=r"1 links lead nowhere, such as in/a\.jsonl -> .*annex"):
        names(pattern)


@pytest.mark.parametrize(
    "name", ["part[1].jsonl", "br[1]/a.jsonl", "a*.jsonl", "what?.txt", "~a.txt"]
)
def test_a_name_that_exists_is_taken_as_it_is(name: str) -> None:
    write(name, "part1.jsonl")
    assert names(name) == [name]
    folder = Path(name).parent
    if folder.name:
        assert names(str(folder)) == [name]
        with pytest.raises(InputError, match=r"'\[\[\]'"):
            names(f"{folder}/*.jsonl")
        assert names("br[[]1]/*.jsonl") == [name]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("a.csv", "JSON Lines"),
        ("a.TSV.gz", "JSON Lines"),
        ("a.zip", "unpack"),
        ("a.tar.gz", "unpack"),
        ("a.pdf", "pdftotext"),
        ("a.docx", "pandoc"),
        ("a.arrow", "to_parquet"),
        ("a.xlsx", "read_excel"),
        ("RC_2020-01.zst", r"RC_2020-01\.jsonl\.zst"),
        ("a.parquet.gz", "decompress"),
    ],
)
def test_what_is_never_text_is_refused_by_name(name: str, fix: str) -> None:
    write(name)
    for pattern in (name, "*" + Path(name).suffix):
        with pytest.raises(InputError, match=rf"{name}: .*{fix}"):
            names(pattern)


def test_folders_that_a_glob_matches_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    write("in/a/x.jsonl", "in/b/y.jsonl")
    with pytest.raises(InputError, match=r"2 folders, such as in/a, and no files; .*'/\*\*/\*'"):
        names("in/*")
    write("in/z.jsonl")
    assert names("in/*") == ["in/z.jsonl"]
    assert "left out 2 folders that it matches: a, b" in capsys.readouterr().err


def test_what_was_made_of_the_files_is_not_one_of_them() -> None:
    write("in/a.jsonl", "in/tokens/manifest.json", "in/b/tokens/c.json")
    for pattern in ("in", "in/**/*.json*"):
        found = [str(path) for path in find_files([pattern], Path("in/tokens"))]
        assert found == ["in/a.jsonl", "in/b/tokens/c.json"]
    assert names("in")[-1] == "in/tokens/manifest.json"


def test_odd_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl")
    with pytest.raises(InputError, match="is empty"):
        names("")
    with pytest.raises(InputError, match=r"too long"):
        names("x" * 5000)
    with pytest.raises(InputError, match=r"null byte|matches no files"):
        names("a\0b")
    os.mkfifo("pipe.jsonl")
    for pattern in ("pipe.jsonl", "*.jsonl"):
        with pytest.raises(InputError, match=r"pipe\.jsonl is a pipe"):
            names(pattern)
    Path("pipe.jsonl").unlink()
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert names("~/a.jsonl") == [str(Path.cwd() / "a.jsonl")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_searched_is_refused() -> None:
    write("in/a/x.jsonl", "in/y.jsonl")
    Path("in/a").chmod(0)
    try:
        for pattern in ("in", "in/**/*.jsonl"):
            with pytest.raises(InputError, match=r"folder in/a cannot be searched: permission"):
                names(pattern)
    finally:
        Path("in/a").chmod(0o700)


def test_what_describes_a_data_set_is_left_out_of_its_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("in/data/a.parquet", "in/dataset_infos.json", "in/data/dataset_info.json", "in/info.json")
    assert names("in") == names("in/**/*") == ["in/data/a.parquet", "in/info.json"]
    described = "2 that describe a data set: dataset_infos.json, data/dataset_info.json"
    assert capsys.readouterr().err.count(described) == 2
    assert names("in/**/*.json") == ["in/info.json"]
    assert len(names("in/*/dataset_info.json")) == 1
    assert names("in/dataset_infos.json") == ["in/dataset_infos.json"]


@pytest.mark.parametrize("pattern", ["my texts/*.jsonl", "my texts", "my texts/a  b.jsonl"])
def test_a_name_torn_apart_at_its_blanks_is_put_together(pattern: str) -> None:
    write("my texts/x.jsonl", "my texts/a  b.jsonl", "other.jsonl")
    pieces = pattern.split(" ")
    with pytest.raises(InputError, match=r"quote a name that holds blanks.*\"'my texts.*'\"$"):
        names("other.jsonl", *pieces)
    with pytest.raises(InputError, match=r"'my' matches no files; correct it$"):
        names("my", "other.jsonl")


@pytest.mark.parametrize("pattern", ["in", "in/**/*.txt", "in/*/*.txt"])
def test_a_folder_on_a_disk_that_is_not_there_is_named(
    pattern: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "here").mkdir(parents=True)
    (tmp_path / "in" / "here" / "a.txt").write_text("a")
    (tmp_path / "in" / "c4").symlink_to("/mnt/none/c4")
    assert find_files([pattern]) == [Path("in/here/a.txt")]
    told = capsys.readouterr().err
    assert "left out" in told and "lead nowhere: " in told and "c4" in told
