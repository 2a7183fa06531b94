"""A tokenization job ends with the same output for any number of workers and interruptions."""

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from data.find import find_files
from data.job import Job, TokenizeConfig
from data.locks import folder_lock
from data.manifest import Manifest
from data.sources import Fields
from data.tasks import Settings, TaskRun
from data.tokenizers import Tokenizer, load_tokenizer
from tests.factories import write_documents

FILES = 6


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for index in range(FILES):
        write_documents(tmp_path / "text" / f"{index}.jsonl", number=20, seed=index)
    return tmp_path / "text"


@pytest.fixture
def tokenizer(sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_model)


@pytest.fixture
def make_job(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., Job]:
    """Job with one file a task."""

    def make(output: str = "tokens", overwrite: bool = False, **settings: Any) -> Job:
        defaults: dict[str, Any] = {
            "fields": Fields(),
            "domains": (),
            "held_out": 0.1,
            "max_bytes_per_domain": None,
            "bytes_per_task": 1,
        }
        return Job(
            find_files([str(source)]),
            Settings(**(defaults | settings)),
            tokenizer,
            tmp_path / output,
            overwrite,
        )

    return make


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stop_after(monkeypatch: pytest.MonkeyPatch, tasks: int, error: BaseException) -> list[int]:
    """Makes every task after the first `tasks` fail; returns the list of tasks that ran."""
    ran: list[int] = []
    original = TaskRun.run

    def run(self: TaskRun, key: str) -> object:
        if len(ran) >= tasks:
            raise error
        ran.append(self._task.index)
        return original(self, key)

    monkeypatch.setattr(TaskRun, "run", run)
    return ran


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


def test_finished_output_is_reused(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job().run(1)
    before = files_of(make_job().output)
    ran = stop_after(monkeypatch, FILES, AssertionError())
    with folder_lock(make_job().output, "training"):  # as where nothing can be written
        manifest, worked = make_job().run(1)
    assert not worked and not ran
    (make_job().output / ".lock").unlink()
    assert manifest == Manifest.load(make_job().output) and files_of(make_job().output) == before


def test_output_of_other_arguments_is_refused_unless_overwritten(
    make_job: Callable[..., Job], source: Path
) -> None:
    make_job().run(1)
    with pytest.raises(InputError, match=r"held_out: 0\.1 there, 0\.3 now.*--overwrite"):
        make_job(held_out=0.3).run(1)
    with pytest.raises(InputError, match=r"bytes_per_task: 1 there, 9999999 now"):
        make_job(bytes_per_task=9_999_999).run(1)
    make_job(held_out=0.0, overwrite=True).run(1)
    make_job("fresh", held_out=0.0).run(1)
    assert files_of(make_job().output) == files_of(make_job("fresh").output)
    (source / "7.jsonl").write_text((source / "0.jsonl").read_text())
    with pytest.raises(InputError, match=r"files: 6 files there, 7 files, among them .*7\.jsonl"):
        make_job(held_out=0.0).run(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("bad input")])
def test_interrupted_job_continues_with_what_is_finished(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4, error)
        with pytest.raises(type(error)):
            make_job().run(1)
    output = make_job().output
    assert [path.name for path in output.iterdir()] == [".partial"]
    with monkeypatch.context() as patch:
        ran = stop_after(patch, FILES, AssertionError())
        make_job().run(1)
    assert ran == [4, 5]
    make_job("whole").run(1)
    assert files_of(output) == files_of(make_job("whole").output)


def test_replaced_input_file_is_read_again(
    make_job: Callable[..., Job], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = (source / "5.jsonl").read_bytes()
    (source / "5.jsonl").write_bytes(sound[:-50])
    with pytest.raises(InputError, match=r"5\.jsonl"):
        make_job().run(1)
    (source / "5.jsonl").write_bytes(sound)
    ran = stop_after(monkeypatch, FILES, AssertionError())
    make_job().run(1)
    assert ran == [5]


def test_unfinished_job_of_other_arguments_is_refused(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_job().run(1)
    with pytest.raises(InputError, match=r"unfinished job with other arguments: held_out"):
        make_job(held_out=0.2).run(1)
    make_job(held_out=0.2, overwrite=True).run(1)
    make_job("fresh", held_out=0.2).run(1)
    assert files_of(make_job().output) == files_of(make_job("fresh").output)


def test_nothing_is_left_when_nothing_was_finished(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 0, InputError("bad input"))
    with pytest.raises(InputError):
        make_job().run(1)
    assert not make_job().output.exists()


@pytest.mark.parametrize("moved", [(), ("train",), ("train", "held_out")])
def test_interrupted_publishing_is_completed(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, moved: tuple[str, ...]
) -> None:
    make_job("whole").run(1)
    job = make_job()
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_publish", stop_publishing)
        with pytest.raises(KeyboardInterrupt):
            job.run(1)
    for split in moved:
        (job.partial / split).replace(job.output / split)
    ran = stop_after(monkeypatch, 0, AssertionError())
    make_job().run(1)
    assert not ran and files_of(job.output) == files_of(make_job("whole").output)


@pytest.mark.parametrize(("split", "suffix"), [("held_out", ".idx"), ("train", ".bin")])
@pytest.mark.parametrize("moved", [False, True])
def test_a_part_damaged_before_it_is_published_is_made_again(
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    split: str,
    suffix: str,
    moved: bool,
) -> None:
    make_job("whole").run(1)
    job = make_job()
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_publish", stop_publishing)
        with pytest.raises(KeyboardInterrupt):
            job.run(1)
    other = {"train": "held_out", "held_out": "train"}[split]
    if moved:
        (job.partial / other).replace(job.output / other)
    shard = next((job.partial / split).rglob(f"*{suffix}"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    make_job().run(1)
    assert files_of(job.output) == files_of(make_job("whole").output)


def test_crash_right_after_publishing_leaves_nothing_in_the_end(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data.job.sync_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_job().run(1)
    output = make_job().output
    assert sorted(path.name for path in output.iterdir())[0] == ".partial"
    assert not make_job().run(1)[1]
    assert sorted(path.name for path in output.iterdir()) == ["held_out", "manifest.json", "train"]


def interrupt(path: Path) -> None:
    raise KeyboardInterrupt


def stop_publishing(job: Job) -> None:
    raise KeyboardInterrupt


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
    with pytest.raises(InputError, match="files that are not tokens"):
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


def test_kill_at_any_moment_then_rerun_gives_the_same_output(
    make_job: Callable[..., Job], source: Path, sentencepiece_model: Path
) -> None:
    make_job("whole").run(1)
    output = make_job().output
    code = (
        "import os, signal, sys, data.tasks as t; run = t.TaskRun.run; count = [0]\n"
        "def patched(self, key):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4:\n"
        "        self._flush = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(self, key)\n"
        "t.TaskRun.run = patched\n"
        "import data.job as j; from data.tokenizers import load_tokenizer\n"
        "from data.sources import Fields; from data.find import find_files\n"
        "from pathlib import Path\n"
        "s = t.Settings(fields=Fields(), domains=(), held_out=.1, max_bytes_per_domain=None, "
        "bytes_per_task=1)\n"
        "files, tokenizer = find_files([sys.argv[1]]), load_tokenizer(sys.argv[2])\n"
        "j.Job(files, s, tokenizer, Path(sys.argv[3])).run(1)\n"
    )
    root = Path(__file__).resolve().parents[2]
    arguments = [sys.executable, "-c", code, str(source), str(sentencepiece_model), str(output)]
    killed = subprocess.run(arguments, cwd=root, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in output.iterdir()} == {".lock", ".partial"}
    assert len(list((output / ".partial/tasks").iterdir())) == 3
    make_job().run(1)
    assert files_of(output) == files_of(make_job("whole").output)


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


def test_output_of_an_older_version_is_reused(make_job: Callable[..., Job]) -> None:
    """Its manifest has the arguments that were there before, and no other keys."""
    job = make_job()
    job.run(1)
    content = json.loads((job.output / "manifest.json").read_text())
    assert content["arguments"].keys() == {
        *("fields", "domains", "held_out", "max_bytes_per_domain", "bytes_per_task", "tokenizer")
    }
    assert content["arguments"]["fields"] == {"text": "text", "domain": "auto"}
    assert content["sources"][0].keys() == {"path", "bytes", "documents"}
    assert not make_job().run(1)[1]
    with pytest.raises(InputError, match=r"fields: .* there, .*skip_incomplete"):
        make_job(fields=Fields(skip_incomplete=True)).run(1)


def test_parts_of_an_older_version_are_made_again(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data.tasks.READING", 1)
        patch.setattr("data.sources.domain_name", lambda name: f"old-{name}")
        stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_job().run(1)
    ran = stop_after(monkeypatch, 2 * FILES, AssertionError())
    make_job().run(1)
    assert ran == list(range(FILES))
    make_job("whole").run(1)
    assert files_of(make_job().output) == files_of(make_job("whole").output)


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_parts_are_checked_before_they_are_used_again(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_job().run(1)
    shard = make_job().partial / "train/beta/00002.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    ran = stop_after(monkeypatch, 2 * FILES, AssertionError())
    make_job().run(workers)
    assert workers == 2 or ran == [2, 4, 5]
    make_job("whole").run(1)
    assert files_of(make_job().output) == files_of(make_job("whole").output)


def test_a_damaged_output_is_not_taken_for_finished(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.run(1)
    sound = files_of(job.output)
    shard = job.output / "train/beta/00002.bin"
    flipped = bytearray(shard.read_bytes())
    flipped[100] ^= 1
    shard.write_bytes(flipped)
    assert not make_job().run(1)[1]
    with pytest.raises(InputError, match=r"00002\.bin is damaged: block 0.*--overwrite"):
        make_job().run(1, verify=True)
    shard.unlink()
    with pytest.raises(InputError, match=r"00002\.bin is missing.*--overwrite"):
        make_job().run(1)
    assert make_job(overwrite=True).run(1)[1]
    assert files_of(job.output) == sound
    assert not make_job().run(1, verify=True)[1]


@pytest.mark.parametrize("content", ["", "[]", "\xff"])
def test_damaged_settings_and_manifests_of_a_job_are_written_again(
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_publish", stop_publishing)
        with pytest.raises(KeyboardInterrupt):
            make_job().run(1)
    partial = make_job().partial
    settings = (partial / "settings.json").read_text()
    (partial / "manifest.json").write_text(content, encoding="latin-1")
    (partial / "settings.json").write_text(content, encoding="latin-1")
    ran = stop_after(monkeypatch, FILES, AssertionError())
    make_job().run(1)
    assert re.search(r"settings\.json: .*; it is written again", capsys.readouterr().err)
    assert not ran and settings
    make_job("whole").run(1)
    assert files_of(make_job().output) == files_of(make_job("whole").output)


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
