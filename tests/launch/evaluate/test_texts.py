"""Texts of --text: which tokens of a published set count, and how a large one is read."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from launch.evaluate import texts
from launch.evaluate.document import scored_rows
from launch.evaluate.texts import TEXT_SETS, _in_whole_windows, read_named


@pytest.mark.parametrize("bos", ["no", "yes", "every"])
@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 200])
def test_windows_of_a_published_set_are_whole(bos: str, length: int) -> None:
    taken = _in_whole_windows(length, bos, 32, None)
    rows = scored_rows(list(range(length)), bos, 7, 32, None)
    whole = [row for row, _ in rows if len(row) == 32]
    scored = scored_rows(list(range(taken)), bos, 7, 32, None)
    assert [row for row, _ in scored] == (whole or [row for row, _ in rows])
    first = scored_rows(list(range(_in_whole_windows(length, bos, 32, 2))), bos, 7, 32, None)
    assert [row for row, _ in first] == (whole or [row for row, _ in rows])[:2]


def test_the_first_rows_of_a_compressed_set_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c4.json.gz"
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        for number in range(5):
            stream.write(json.dumps({"text": f"ä{number}", "url": "x"}) + "\n")
    few = replace(TEXT_SETS["c4"], rows=3)
    monkeypatch.setitem(TEXT_SETS, "c4", few)
    monkeypatch.setattr(texts, "_file_of", lambda name, known: file)
    monkeypatch.chdir(tmp_path)
    assert read_named("c4").text == "ä0 ä1 ä2" and read_named("c4").published is few


@pytest.mark.parametrize("place", ["validation/0000.parquet", "ptb-validation-00000.parquet"])
def test_a_file_is_found_in_whatever_folder_the_hub_keeps_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = TEXT_SETS["ptb"]
    cache = tmp_path / f"datasets--{known.repository.replace('/', '--')}"
    file = cache / "snapshots" / "abc" / "penn_treebank" / place
    file.parent.mkdir(parents=True)
    (cache / "refs" / known.revision).parent.mkdir(parents=True)
    (cache / "refs" / known.revision).write_text("abc")
    parquet.write_table(pa.table({"sentence": ["one", "two"]}), file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_named("ptb").text == "one\n\ntwo"
