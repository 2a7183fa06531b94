"""A tokenization job ends with the same output for any number of workers, or says why not."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.job import Job
from data.locks import folder_lock
from data.manifest import Manifest
from data.tokenize_config import TokenizeConfig
from tests.data.helpers import FILES, files_of, stop_after


def test_output_does_not_depend_on_the_number_of_workers(make_job: Callable[..., Job]) -> None:
    one, three = make_job("one"), make_job("three")
    manifest, worked = one.run(1)
    assert worked and list(manifest.splits["train"]) == ["alpha", "beta"]
    assert len(manifest.splits["train"]["alpha"]) == FILES
    three.run(3)
    assert files_of(one.output) == files_of(three.output)


def test_worker_error_reaches_the_user(make_job: Callable[..., Job], source: Path) -> None:
    (source / "3.jsonl").write_text("{broken")
    job = make_job()
    with pytest.raises(InputError, match=r"3\.jsonl:1: not valid JSON"):
        job.run(2)
    assert not list(job.output.glob("train")) and not (job.output / "manifest.json").exists()


def test_output_of_other_arguments_is_refused_unless_overwritten(
    make_job: Callable[..., Job], source: Path
) -> None:
    make_job().run(1)
    with pytest.raises(InputError, match=r"--held-out: 0\.1 there, 0\.3 now.*--overwrite"):
        make_job(held_out=0.3).run(1)
    with pytest.raises(InputError, match=r"--task-mib: .* there, 9\.53674 now"):
        make_job(bytes_per_task=9_999_999).run(1)
    make_job(held_out=0.0, overwrite=True).run(1)
    make_job("fresh", held_out=0.0).run(1)
    assert files_of(make_job().output) == files_of(make_job("fresh").output)
    (source / "7.jsonl").write_text((source / "0.jsonl").read_text())
    with pytest.raises(InputError, match=r"--input: 6 files there, 7 files, among them .*7\.jsonl"):
        make_job(held_out=0.0).run(1)


def test_limit_counts_over_all_tasks(make_job: Callable[..., Job]) -> None:
    job = make_job(max_bytes_per_domain=12_000, held_out=0.1)
    manifest, _ = job.run(4)
    for domain in ("alpha", "beta"):
        shards = [shard for split in manifest.splits.values() for shard in split[domain]]
        assert 12_000 <= sum(shard.text_bytes for shard in shards) < 12_400
    assert len(manifest.sources) == FILES
    assert not make_job(max_bytes_per_domain=12_000).run(1)[1]


def test_folder_of_something_else_is_refused(make_job: Callable[..., Job]) -> None:
    output = make_job().output
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"not tokens, such as thesis\.tex; .*logs beside"):
        make_job(overwrite=True).run(1)
    assert (output / "thesis.tex").exists()


def test_second_process_on_the_same_output_is_refused(make_job: Callable[..., Job]) -> None:
    job = make_job()
    with folder_lock(job.output, "training"):
        with pytest.raises(InputError, match=r"--output .*another process is tokenizing"):
            job.run(1)
        assert (job.output / ".lock").exists()
    # What a killed run or an older version left there is in nobody's way, and goes.
    job.partial.mkdir(parents=True)
    (job.partial / "lock").write_text("")
    make_job("whole").run(1)
    job.run(1)
    assert files_of(job.output) == files_of(make_job("whole").output)


def test_full_disk_is_explained(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(InputError, match="no space left on the disk of"):
        make_job().run(1)


def test_input_without_text_is_refused(make_job: Callable[..., Job], source: Path) -> None:
    for path in source.iterdir():
        path.write_text('{"text": "", "meta": {"redpajama_set_name": "x"}}')
    with pytest.raises(InputError, match="no text at all"):
        make_job().run(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_names_that_become_one_domain_are_refused_over_all_parts(
    make_job: Callable[..., Job], source: Path, workers: int
) -> None:
    for name, domain in (("a", "Common Crawl"), ("z", "common-crawl")):
        record = {"text": "some words", "meta": {"redpajama_set_name": domain}}
        (source / f"{name}.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"'[Cc]ommon.*a\.jsonl:1.*z\.jsonl:1|z\.jsonl.*a\.jsonl"):
        make_job().run(workers)
    manifest, _ = make_job(merge_domains=True).run(workers)
    assert "common-crawl" in manifest.splits["train"] | manifest.splits["held_out"]
    # The option lets pass and changes nothing else: an output made with it is made without it too.
    assert not make_job().run(workers)[1]


def test_an_output_that_cannot_be_written_is_named(
    make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "far")
    for output in ("file", "file/tokens", "dangling", "x" * 300):
        with pytest.raises(InputError, match=rf"--output .*{output}"):
            make_job(output).run(1)
    stop_after(monkeypatch, 2, OSError(errno.EROFS, "Read-only file system", "/t/a.bin.tmp"))
    with pytest.raises(InputError, match=r"--output .*\(/t/a\.bin\.tmp\): read-only file system"):
        make_job().run(1)


def test_an_input_that_changes_meanwhile_is_named(
    make_job: Callable[..., Job], source: Path
) -> None:
    job = make_job()
    (source / "3.jsonl").rename(source / "3.bak")
    with pytest.raises(InputError, match=r"3\.jsonl: no such file; .*put it back"):
        job.run(1)
    (source / "3.jsonl").write_text((source / "3.bak").read_text() * 2)
    with pytest.raises(InputError, match=r"3\.jsonl has .* bytes and had .* when the command"):
        job.run(1)
    (source / "3.bak").replace(source / "3.jsonl")
    assert job.run(1)[1]


def test_more_domains_than_open_files(tmp_path: Path, sentencepiece_model: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "some words", "d": f"d{number}"}) for number in range(150)]
    path.write_text("\n".join(lines))
    command = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from data.tokenize import main; main(sys.argv[1:])"
    )
    arguments = ["--input", path, "--tokenizer", sentencepiece_model, "--domain-field", "d"]
    arguments += ["--held-out", 0, "--workers", 1, "--output", tmp_path / "tokens"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", command, *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(Manifest.load(tmp_path / "tokens").splits["train"]) == 150


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input": ()}, "--input"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"held_out": -0.1}, "--held-out -0.1"),
        ({"workers": 0}, "--workers 0"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"task_mib": 0}, "--task-mib 0"),
        ({"max_bytes_per_domain": 0}, "--max-bytes-per-domain 0"),
        ({"max_record_mib": 0}, "--max-record-mib 0"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        TokenizeConfig(**({"input": ("a",), "tokenizer": "t"} | change))
