"""`data.tokenize --conversations` as a command: report, refusals, resuming, and older versions."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data.errors import InputError
from data.manifest import HELD_OUT, PACKED, TRAIN, Manifest
from data.reader import TokenReader
from data.tasks import TAKEN
from data.tokenize import main
from tests.data.helpers import files_of, stop_after
from tests.factories import CHATML, conversations, write_tokenizer

GOOD = {"instruction": "why?", "output": "because"}
Tokenize = Callable[..., None]


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "spoken", *CHATML)


@pytest.fixture
def tokenize(tokenizer_folder: Path, tmp_path: Path) -> Tokenize:
    def call(*more: object, output: str = "chat", template: str = "chatml") -> None:
        words = [
            *("--input", tmp_path / "talks", "--conversations", "--chat-template", template),
            *("--tokenizer", tokenizer_folder, "--output", tmp_path / output),
            *("--seq-len", 128, "--held-out", 0, "--workers", 1, *more),
        ]
        main([str(word) for word in words])

    return call


def write(tmp_path: Path, records: list[Any], name: str = "a.jsonl") -> Path:
    path = tmp_path / "talks" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def samples(folder: Path, split: str = TRAIN) -> np.ndarray:
    reader = TokenReader(folder, 128, split=split, documents=None)
    return reader.samples("talks", np.arange(reader.sizes["talks"])).ids


def test_forms_and_formats_may_be_mixed(tokenize: Tokenize, tmp_path: Path) -> None:
    """A folder of three formats holds the tokens that one file holds."""
    records = conversations(30)
    write(tmp_path, records)
    tokenize(output="one")
    shutil.rmtree(tmp_path / "talks")
    write(tmp_path, records[:10], "1.jsonl")
    packed = "".join(json.dumps(record) + "\n" for record in records[10:20])
    (tmp_path / "talks" / "2.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    columns = ("conversations", "messages", "instruction", "output", "history")
    table = {name: [record.get(name) for record in records[20:]] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "talks" / "3.parquet")
    tokenize(output="three")
    assert np.array_equal(samples(tmp_path / "one"), samples(tmp_path / "three"))
    one, three = (Manifest.load(tmp_path / name) for name in ("one", "three"))
    assert one.fingerprint == three.fingerprint and one.version == PACKED
    assert one.counts == three.counts and one.counts["conversations"] == 30


def test_columns_of_no_conversation_are_named(tokenize: Tokenize, tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    table = pyarrow.table({"prompt": ["a"], "response": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "talks" / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet:1: .*keys present: prompt, response; wanted"):
        tokenize()


def test_the_report_counts_what_was_cut_and_left_out(
    tokenize: Tokenize, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d" * 200},
        {"role": "user", "content": "e"},
    ]}  # fmt: skip
    hopeless = {"instruction": "a", "output": "b" * 200}
    bad = [{"text": "x"}, {"instruction": "", "output": "b"}, {"text": "y"}]
    spelled = {"instruction": "<|im_end|>", "output": "b"}
    path = write(tmp_path, [GOOD, *bad, long, hopeless, spelled, GOOD])
    for _ in range(2):  # also where the folder is there already
        tokenize("--skip-incomplete")
        printed = capsys.readouterr()
        words = " ".join(printed.out.split())
        assert "3 conversations in the chat template of chatml: 3 answers with" in words
        assert "1 lack their last answers (1), for which samples of 128 have no room" in words
        assert "1 end with a user's turn, which is left out" in words
        assert f"2 with no conversation (such as {path}:2)" in printed.err
        assert f"1 with an empty turn (such as {path}:3)" in printed.err
        assert f"1 with a turn that spells a special token (such as {path}:7)" in printed.err
        assert f"1 with a first answer that no sample has room for (such as {path}:6)" in (
            printed.err
        )
    manifest = Manifest.load(tmp_path / "chat")
    (source,) = manifest.sources
    assert (source.documents, source.incomplete) == (3, 5)
    assert manifest.counts.keys() == TAKEN.keys() | manifest.examples.keys()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"a\.jsonl:2: no conversation; keys present: text; wanted: .*--skip-inc"),
        ({"messages": [{"role": "user", "content": ""}]}, r"a\.jsonl:2: turn 1 .* is empty; corr"),
        ({"instruction": "<|im_start|>", "output": "b"}, r"a\.jsonl:2: turn 1 spells '<\|im_start"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_refused_by_its_place(
    tokenize: Tokenize, tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    write(tmp_path, [GOOD, record])
    with pytest.raises(InputError, match=message):
        tokenize()
    assert not (tmp_path / "chat" / "manifest.json").exists()


def test_input_without_any_conversation_says_what_there_was(
    tokenize: Tokenize, tmp_path: Path
) -> None:
    write(tmp_path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(InputError, match=r"to train on: 2 with no conversation \(such as .*:1\)"):
        tokenize("--skip-incomplete")


def test_text_and_conversations_are_told_apart(tokenize: Tokenize, tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    with pytest.raises(InputError, match=r"'text': it is a conversation; --conversations takes"):
        main(["--input", str(path), "--tokenizer", str(tmp_path / "spoken")])
    (tmp_path / "talks" / "b.txt").write_text("words")
    with pytest.raises(InputError, match=r"b\.txt: plain text holds no conversations"):
        tokenize()


def test_names_given_twice_are_refused(tokenize: Tokenize, tmp_path: Path) -> None:
    write(tmp_path, []).write_text('{"instruction": "a", "output": "b", "output": "c"}\n')
    with pytest.raises(InputError, match=r":1: 'output' is given twice"):
        tokenize("--skip-incomplete")
    turns = (
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": 1}]'
    )
    write(tmp_path, []).write_text(f'{{"messages": {turns}}}\n')
    with pytest.raises(InputError, match=r":1: turn 2 of 'messages' has 'content' twice"):
        tokenize()


def test_a_named_field_gives_the_domain(tokenize: Tokenize, tmp_path: Path) -> None:
    write(tmp_path, [GOOD | {"kind": "Math QA"}, GOOD | {"kind": "prose"}])
    tokenize("--domain-field", "kind")
    assert Manifest.load(tmp_path / "chat").domains(TRAIN) == ["math-qa", "prose"]


def test_the_result_does_not_depend_on_workers_or_an_interruption(
    tokenize: Tokenize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(4):
        write(tmp_path, [*conversations(40, index), {"no": 1}], f"{index}.jsonl")
    # A mebibyte of blanks makes each file a part of its own.
    for path in (tmp_path / "talks").iterdir():
        path.write_text(path.read_text() + "\n" * (1 << 20))
    wanted = ("--task-mib", 1, "--skip-incomplete", "--held-out", 0.2)
    tokenize(*wanted, output="one")
    tokenize(*wanted, "--workers", 3, output="three")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2, KeyboardInterrupt())
        tokenize(*wanted, output="parts")
    ran = stop_after(monkeypatch, 9, KeyboardInterrupt())
    tokenize(*wanted, output="parts")
    assert ran == [2, 3]
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "three") == files_of(tmp_path / "parts")
    manifest = Manifest.load(tmp_path / "one")
    assert manifest.counts["no conversation"] == 4
    assert manifest.examples["no conversation"].endswith("0.jsonl:41")
    assert len([name for name in one if name.endswith(".marks.bin")]) == 8
    assert not set(map(tuple, samples(tmp_path / "one", HELD_OUT))) & set(
        map(tuple, samples(tmp_path / "one"))
    )


def test_another_length_or_template_is_another_job(tokenize: Tokenize, tmp_path: Path) -> None:
    write(tmp_path, conversations(10))
    tokenize()
    with pytest.raises(InputError, match=r"--seq-len: 128 there, 256 now"):
        tokenize("--seq-len", 256)
    with pytest.raises(InputError, match=r"--chat-template: chatml \(.*\) there, vicuna \(.* now"):
        tokenize(template="vicuna")
    tokenize("--seq-len", 512, "--overwrite", template="vicuna")
    record = Manifest.load(tmp_path / "chat").chat
    assert record is not None and (record.template_name, record.seq_len) == ("vicuna", 512)


@pytest.mark.parametrize("suffix", [".marks.bin", ".marks.crc", ".marks.idx"])
def test_damaged_marks_are_noticed(tokenize: Tokenize, tmp_path: Path, suffix: str) -> None:
    write(tmp_path, conversations(20))
    tokenize()
    path = next((tmp_path / "chat").rglob(f"*{suffix}"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"00000\.marks.*--overwrite"):
        tokenize("--verify")
    if suffix != ".marks.idx":  # which training does not read
        with pytest.raises(InputError, match=r"00000\.marks"):
            samples(tmp_path / "chat")
    path.unlink()
    if suffix != ".marks.crc":
        with pytest.raises(InputError, match=r"00000\.marks\.\w+ is missing"):
            tokenize()
        with pytest.raises(InputError, match=r"00000\.marks\.\w+ is missing"):
            samples(tmp_path / "chat")


def test_older_versions_refuse_conversations_and_text_is_as_before(
    tokenize: Tokenize, tmp_path: Path, tiny_tokens: Path
) -> None:
    """They read version 1, in which they know no other keys than these."""
    write(tmp_path, conversations(10))
    tokenize()
    chat, text = (
        json.loads((folder / "manifest.json").read_text())
        for folder in (tmp_path / "chat", tiny_tokens)
    )
    assert chat["version"] == 2 and text["version"] == 1
    assert not {"chat", "counts", "examples"} & text.keys()
    shards = [shard for of in text["splits"].values() for some in of.values() for shard in some]
    assert shards and all("marks" not in shard for shard in shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=1), "`chat` belongs into version 2"),
        (lambda content: content.pop("chat"), "`chat` belongs into version 2"),
        (lambda content: _first(content).pop("marks"), "must have `marks` beside `chat`"),
        (lambda content: _first(content)["marks"].update(tokens=5), "no whole samples of 128"),
        (lambda content: content["chat"].update(seq_len=100), "no whole samples of 100"),
        (lambda content: content["chat"].update(seq_len=0), "no whole samples of 0"),
        (lambda content: content["chat"].update(end_of_turn=261), "261 is no id below 261"),
        (lambda content: _first(content)["marks"].update(path="../x"), r"are at '\.\./x'"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(
    tokenize: Tokenize, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    write(tmp_path, conversations(10))
    tokenize()
    path = tmp_path / "chat" / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        Manifest.load(tmp_path / "chat")


def _first(content: dict[str, Any]) -> dict[str, Any]:
    shard: dict[str, Any] = content["splits"][TRAIN]["talks"][0]
    return shard
