"""Tokens of one input task, split by domain, for any size of a batch."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.errors import InputError
from data.manifest import HELD_OUT, TRAIN
from data.shards import ShardReader
from data.sources import Fields
from data.tasks import Report, Settings, Task, TaskRun, finished_report, is_held_out, plan_tasks
from data.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer)


def write_records(path: Path, records: list[tuple[str, str]]) -> Path:
    lines = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": domain}})
        for domain, text in records
    ]
    path.write_text("\n".join(lines))
    return path


def run_task(
    path: Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    held_out: float = 0.0,
    domains: tuple[str, ...] = (),
    limit: int | None = None,
    used: dict[str, int] | None = None,
) -> Report:
    settings = Settings(
        fields=Fields(),
        domains=domains,
        held_out=held_out,
        max_bytes_per_domain=limit,
        bytes_per_task=1 << 30,
    )
    (task,) = plan_tasks([path], settings.bytes_per_task)
    return TaskRun(task, settings, tokenizer, folder, lambda _: None, used).run("key")


def texts(report: Report, folder: Path, tokenizer: Tokenizer, split: str, domain: str) -> list[str]:
    """The documents of a shard, decoded; checks that each ends with EOS."""
    record = report.shards[split][domain]
    reader = ShardReader(folder, record, "uint16", "once")
    tokens = np.empty(record.tokens, np.int64)
    reader.read_into(0, tokens)
    bounds = reader.documents()
    documents = [tokens[a:b] for a, b in itertools.pairwise(bounds)]
    assert all(document[-1] == tokenizer.eos_id for document in documents)
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def test_documents_go_to_their_domain_in_input_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [("RedPajamaC4", "one"), ("RedPajamaGithub", "x </s> y"), ("RedPajamaC4", "two")]
    path = write_records(tmp_path / "a.jsonl", records)
    folder = tmp_path / "out"
    report = run_task(path, tokenizer, folder)
    assert list(report.shards) == [TRAIN] and set(report.shards[TRAIN]) == {"c4", "github"}
    assert texts(report, folder, tokenizer, TRAIN, "c4") == ["one", "two"]
    assert texts(report, folder, tokenizer, TRAIN, "github") == ["x </s> y"]
    assert [(source.path, source.documents) for source in report.sources] == [(str(path), 3)]
    assert report.text_bytes() == {"c4": 6, "github": 8}
    assert Report.load(folder / "tasks/00000.json") == report


def test_batches_do_not_change_the_result(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [(f"d{i % 3}", f"text number {i}") for i in range(50)]
    path = write_records(tmp_path / "a.jsonl", records)
    whole = run_task(path, tokenizer, tmp_path / "whole")
    monkeypatch.setattr("data.tasks.BATCH_DOCUMENTS", 7)
    assert run_task(path, tokenizer, tmp_path / "small").shards == whole.shards


def test_bos_comes_first_where_the_tokenizer_adds_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_records(tmp_path / "a.jsonl", [("c4", "ab"), ("c4", "c")])
    tokenizer.adds_bos = True
    report = run_task(path, tokenizer, tmp_path)
    tokens = np.fromfile(tmp_path / "train/c4/00000.bin", np.uint16).tolist()
    a, b = tokenizer.encode(["ab"])[0].tolist()
    (c,) = tokenizer.encode(["c"])[0].tolist()
    assert tokens == [1, a, b, 2, 1, c, 2] and report.shards[TRAIN]["c4"].documents == 2


def test_held_out_split_is_disjoint_and_deterministic(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # Each text occurs twice, once in each half.
    records = [("c4", f"document {i % 200}") for i in range(400)]
    path = write_records(tmp_path / "a.jsonl", records)
    report = run_task(path, tokenizer, tmp_path / "out", held_out=0.2)
    train = texts(report, tmp_path / "out", tokenizer, TRAIN, "c4")
    held_out = texts(report, tmp_path / "out", tokenizer, HELD_OUT, "c4")
    assert len(train) + len(held_out) == 400
    assert not set(train) & set(held_out)
    assert 40 < len(held_out) < 120
    again = run_task(path, tokenizer, tmp_path / "again", held_out=0.2)
    assert again.shards == report.shards


def test_held_out_fraction() -> None:
    chosen = [is_held_out(str(i).encode(), 0.05) for i in range(20_000)]
    assert 0.045 < np.mean(chosen) < 0.055
    assert not any(is_held_out(str(i).encode(), 0.0) for i in range(1000))
    # A larger fraction only adds documents.
    assert all(is_held_out(str(i).encode(), 0.1) for i in range(20_000) if chosen[i])


def test_unknown_domain_names_line_and_list(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_records(tmp_path / "a.jsonl", [("c4", "one"), ("book", "two")])
    folder = tmp_path / "out"
    with pytest.raises(InputError, match=r"a\.jsonl:2: domain 'book' .* --domains c4 github"):
        run_task(path, tokenizer, folder, domains=("c4", "github"))
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_failure_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_records(tmp_path / "a.jsonl", [("c4", f"text {i}") for i in range(20)])
    path.write_text(path.read_text() + "\n{broken")
    monkeypatch.setattr("data.tasks.BATCH_DOCUMENTS", 4)
    folder = tmp_path / "out"
    with pytest.raises(InputError, match=r"a\.jsonl:21"):
        run_task(path, tokenizer, folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_id_outside_the_dtype_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_records(tmp_path / "a.jsonl", [("c4", "text")])
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, batch: [np.array([70_000]) for _ in batch]
    )
    folder = tmp_path / "out"
    with pytest.raises(InputError, match="token id 70000 does not fit uint16"):
        run_task(path, tokenizer, folder)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_limit_stops_a_domain_after_the_document_that_reaches_it(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [("a", "x" * 10), ("b", "y" * 100), ("a", "z" * 10), ("a", "w"), ("b", "v")]
    path = write_records(tmp_path / "a.jsonl", records)
    folder = tmp_path / "out"
    report = run_task(path, tokenizer, folder, limit=15)
    assert report.text_bytes() == {"a": 20, "b": 100}
    assert texts(report, folder, tokenizer, TRAIN, "a") == ["x" * 10, "z" * 10]
    later = run_task(path, tokenizer, tmp_path / "later", limit=15, used={"a": 20, "b": 3})
    assert later.text_bytes() == {"b": 100}


def test_reading_stops_once_every_expected_domain_is_full(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_records(tmp_path / "a.jsonl", [("a", "x" * 10), ("a", "y")])
    path.write_text(path.read_text() + "\n" + json.dumps({"no": "text"}))
    report = run_task(path, tokenizer, tmp_path / "out", limit=5, domains=("a",))
    assert report.sources[0].documents == 1


def test_plan_depends_on_the_files_alone(tmp_path: Path) -> None:
    paths = []
    for index, size in enumerate([10, 10, 30, 5, 100, 1]):
        paths.append(tmp_path / f"{index}.txt")
        paths[-1].write_bytes(b"x" * size)
    tasks = plan_tasks(paths, 40)
    assert [[size for _, size in task.files] for task in tasks] == [[10, 10], [30, 5], [100], [1]]
    assert [task.index for task in tasks] == [0, 1, 2, 3]
    assert Task(0, tasks[0].files).key({"a": 1}) == tasks[0].key({"a": 1})
    assert tasks[0].key({"a": 1}) != tasks[0].key({"a": 2}) != tasks[1].key({"a": 2})


def test_all_empty_files_are_named_before_any_work(tmp_path: Path) -> None:
    sizes = {"a.jsonl": 0, "b.jsonl.zst": 13, "c.parquet": 4, "d.jsonl": 40, "e.txt": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    files = [tmp_path / name for name in sizes]
    with pytest.raises(InputError, match=r"3 of 5 .*a\.jsonl \(0 b.*b\.jsonl.*c\.parq") as error:
        plan_tasks(files, 1 << 20)
    assert "d.jsonl" not in str(error.value) and "e.txt" not in str(error.value)
    assert len(plan_tasks(files[3:], 1 << 20)) == 1


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".bin", lambda content: content[:-2]),
        (".bin", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (".idx", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        (".crc", lambda content: content[:-1]),
        (".bin", None),
        (".idx", None),
        (".crc", None),
    ],
)
def test_output_of_a_finished_task_is_used_only_if_all_of_it_is_sound(
    tmp_path: Path,
    tokenizer: Tokenizer,
    suffix: str,
    damage: Callable[[bytes], bytes] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_records(tmp_path / "a.jsonl", [("c4", "some text")])
    report = run_task(path, tokenizer, tmp_path)
    (task,) = plan_tasks([path], 1 << 30)

    def found(key: str = "key") -> Report | None:
        return finished_report(task, key, tmp_path, "uint16", lambda _: None)

    assert found() == report and found("other") is None
    shard = tmp_path / f"train/c4/00000{suffix}"
    if damage is None:
        shard.unlink()
    else:
        shard.write_bytes(damage(shard.read_bytes()))
    assert found() is None
    assert "part 0 is made again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"key": "key"}', '{"key": 3, "shards": {}, "sources": []}', "\xff"]
)
def test_damaged_report_means_the_part_is_made_again(
    tmp_path: Path, tokenizer: Tokenizer, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_records(tmp_path / "a.jsonl", [("c4", "some text")])
    run_task(path, tokenizer, tmp_path)
    (tmp_path / "tasks/00000.json").write_text(content, encoding="latin-1")
    (task,) = plan_tasks([path], 1 << 30)
    assert finished_report(task, "key", tmp_path, "uint16", lambda _: None) is None
    assert "00000.json" in capsys.readouterr().err
