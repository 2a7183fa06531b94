"""`data.tokenize` as a command: ids, report, help and refusals."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from data.errors import InputError
from data.find import find_files
from data.manifest import Manifest
from data.reader import TokenReader
from data.sources import Fields, iterate_documents
from data.tasks import is_held_out
from data.tokenize import main

ROOT = Path(__file__).resolve().parents[2]


def tokenize(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_real_documents_have_exactly_sentencepieces_ids(shared_data: Path, tmp_path: Path) -> None:
    """Every token of every domain and split against sentencepiece on the same documents."""
    pattern = str(shared_data / "slimpajama-sample/train/**/*.jsonl.zst")
    model = shared_data / "llama-tokenizer.model"
    tokenize(
        *("--input", pattern, "--tokenizer", model, "--output", tmp_path / "tokens"),
        *("--held-out", 0.05, "--workers", 1, "--max-bytes-per-domain", 150_000),
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected: dict[tuple[str, str], list[int]] = {}
    used: dict[str, int] = {}
    for path in find_files([pattern]):
        for document in iterate_documents(path, Fields()):
            encoded = document.text.encode()
            if used.setdefault(document.domain, 0) >= 150_000:
                continue
            used[document.domain] += len(encoded)
            split = "held_out" if is_held_out(encoded, 0.05) else "train"
            ids = [1, *oracle.encode(document.text), 2]
            expected.setdefault((split, document.domain), []).extend(ids)
    manifest = Manifest.load(tmp_path / "tokens")
    assert len(used) == 7
    assert set(manifest.splits["train"]) == {
        *("arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")
    } & {domain for split, domain in expected if split == "train"}
    for (split, domain), ids in expected.items():
        reader = TokenReader(tmp_path / "tokens", 1, split=split)
        found = reader.read(domain, np.arange(reader.sizes[domain]))[:, 0]
        assert found.tolist() == ids


def test_report_names_samples_and_warns(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domain, repeat in (("long", 400), ("short", 3)):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "a.txt").write_text("word " * repeat)
    arguments = [
        *("--input", tmp_path / "long", tmp_path / "short", "--tokenizer", tiny_tokenizer),
        *("--output", tmp_path / "tokens", "--seq-len", 100, "--held-out", 0, "--workers", 1),
    ]
    tokenize(*arguments)
    printed = capsys.readouterr()
    assert "2,001" in printed.out and "20" in printed.out
    assert "no held-out documents in long, short" in printed.err
    assert "less than one sample of 100 training tokens in short" in printed.err
    tokenize(*arguments)
    assert "already tokenized with these arguments" in capsys.readouterr().out


def test_report_says_what_is_missing(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text("word " * 100)
    (folder / "empty.txt").write_text("")
    (folder / "d.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    table = pyarrow.table({"text": pyarrow.array([], "string")})
    pyarrow.parquet.write_table(table, folder / "part.parquet")
    arguments = [
        *("--input", folder, "--tokenizer", tiny_tokenizer, "--output", tmp_path / "tokens"),
        *("--seq-len", 10, "--held-out", 1e-9, "--workers", 1, "--domain-field", "folder"),
        *("--domains", "notes", "githbu", "--skip-incomplete"),
    ]
    for _ in range(2):  # also where the folder is there already
        tokenize(*arguments)
        printed = capsys.readouterr().err
        assert "left out records without text or domain: 1, in " in printed
        assert "2 of 6 files hold no text: " in printed and "part.parquet" in printed
        assert "no documents in githbu, which --domains names" in printed
        assert "no held-out documents in notes (4); " in printed
        assert "use --held-out 0.5, or split long files into several documents" in printed


def run_command(
    *arguments: object, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data.tokenize", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_shows_examples_and_does_not_load_torch() -> None:
    done = run_command("--help-all")
    assert done.returncode == 0
    assert "examples:" in done.stdout and "--max-bytes-per-domain" in done.stdout
    code = (
        "import sys, data.tokenize\n"
        "try: data.tokenize.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_truncated_input_is_one_clear_message(
    sentencepiece_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    sample = shared_data / "slimpajama-sample/train/chunk1/example_train_1.jsonl.zst"
    bad = tmp_path / "bad.jsonl.zst"
    bad.write_bytes(sample.read_bytes()[:-1000])
    output = tmp_path / "tokens"
    done = run_command("--input", bad, "--tokenizer", sentencepiece_model, "--output", output)
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert message.startswith(f"error: {bad} (457,391 bytes) is truncated or damaged")
    assert "download it again" in message and "Traceback" not in done.stderr
    assert not output.exists()


def test_names_that_the_terminal_lacks_are_escaped(
    sentencepiece_model: Path, tmp_path: Path
) -> None:
    for name in ("新闻", "cut"):
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        (folder / os.fsdecode(b"a\xfe.jsonl")).write_text('{"text": null}\n{"text": "x"}')
    arguments = ["--input", tmp_path / "in", "--tokenizer", sentencepiece_model]
    arguments += ["--domain-field", "folder", "--workers", 1, "--output", tmp_path / "tokens"]
    arguments += ["--skip-incomplete", "--held-out", 0]
    done = run_command(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\\u65b0\\u95fb" in done.stdout and "a\\udcfe.jsonl" in done.stderr
    assert Manifest.load(tmp_path / "tokens").splits["train"].keys() == {"新闻", "cut"}
    assert "already" in run_command(*arguments, PYTHONIOENCODING="utf-8").stdout


def test_workers_from_the_command_line(sentencepiece_model: Path, tmp_path: Path) -> None:
    for index in range(2):
        folder = tmp_path / f"d{index}"
        folder.mkdir()
        (folder / "a.txt").write_text("some words " * 50_000)
    arguments = ["--input", tmp_path / "d*/*.txt", "--tokenizer", sentencepiece_model]
    arguments += ["--held-out", 0, "--task-mib", 1]
    for workers in (1, 2):
        more = ["--output", tmp_path / str(workers), "--workers", workers]
        done = run_command(*arguments, *more)
        assert done.returncode == 0, done.stderr
    prints = {Manifest.load(tmp_path / str(workers)).fingerprint for workers in (1, 2)}
    assert len(prints) == 1
    shards = Manifest.load(tmp_path / "2").splits["train"]
    assert [shards[f"d{i}"][0].path for i in range(2)] == [f"train/d{i}/0000{i}" for i in range(2)]


def test_missing_input_is_refused(sentencepiece_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="matches no files"):
        tokenize("--input", tmp_path / "none", "--tokenizer", sentencepiece_model)
