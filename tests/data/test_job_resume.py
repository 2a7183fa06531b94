"""An interrupted or finished tokenization job goes on, and ends as an undisturbed one does."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import InputError
from data.job import Job
from data.locks import folder_lock
from data.manifest import Manifest
from data.sources import Fields
from data.tokenizers import load_tokenizer
from tests.data.helpers import FILES, files_of, stop_after
from tests.factories import move_hub_model, write_hub_model


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
    with pytest.raises(InputError, match=r"unfinished job with other arguments: --held-out"):
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
    with pytest.raises(InputError, match=r"--skip-incomplete: not given there, on now"):
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
    # What the message says helps, without --verify too.
    assert make_job(overwrite=True).run(1)[1]
    assert files_of(job.output) == sound
    assert not make_job(overwrite=True).run(1)[1]
    assert not make_job().run(1, verify=True)[1]


def test_shards_whose_manifest_is_gone_are_named(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.run(1)
    sound = files_of(job.output)
    (job.output / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json that says what they are.*--overwrite"):
        make_job().run(1)
    (job.output / "train" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds files that are not tokens, such as train"):
        make_job(overwrite=True).run(1)
    (job.output / "train" / "notes.txt").unlink()
    assert make_job(overwrite=True).run(1)[1]
    assert files_of(job.output) == sound


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".crc"])
def test_every_file_of_a_finished_output_counts(suffix: str, make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.run(1)
    sound = files_of(job.output)
    file = job.output / f"train/beta/00002{suffix}"
    for content, found in ((None, "is missing"), (b"", "has 0 bytes")):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=rf"00002\{suffix} {found}.*--overwrite"):
            make_job().run(1)
        assert make_job(overwrite=True).run(1)[1]
        assert files_of(job.output) == sound


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


def ending_with(job: Job, eos_id: int) -> Job:
    """The job as after a change of eos_token, which is not in the file of the vocabulary."""
    job.tokenizer.eos_id = eos_id
    return Job(
        [Path(f) for t in job.tasks for f, _ in t.files],
        job.settings,
        job.tokenizer,
        job.output,
        job.overwrite,
    )


def test_other_settings_of_the_tokenizer_are_another_job(make_job: Callable[..., Job]) -> None:
    make_job().run(1)
    with pytest.raises(
        InputError, match=r"ends documents with \(eos_token\): 2 there, 1 now\. Use"
    ):
        ending_with(make_job(), 1).run(1, verify=True)
    manifest, worked = ending_with(make_job(overwrite=True), 1).run(1)
    assert worked and manifest.tokenizer.eos_id == 1
    assert not ending_with(make_job(), 1).run(1)[1]
    job = make_job()
    job.tokenizer.adds_bos = False
    with pytest.raises(InputError, match="begins documents with: 1 there, not given now"):
        ending_with(job, 1).run(1)
    # What is not written does not count.
    job.tokenizer.bos_id = None
    ending_with(make_job("bare"), 1).run(1)
    job.tokenizer.bos_id = 1
    assert not ending_with(make_job("bare"), 1).run(1)[1]


def test_an_unfinished_job_is_not_finished_by_another_tokenizer(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make_job().run(1)
    with pytest.raises(InputError, match=r"unfinished job .*\(eos_token\): 2 there, 1 now\. Use"):
        ending_with(make_job(), 1).run(1)
    # Nor are its parts taken where nothing else tells.
    (make_job().partial / "settings.json").unlink()
    ran = stop_after(monkeypatch, FILES, AssertionError())
    ending_with(make_job(), 1).run(1)
    assert ran == list(range(FILES))


@pytest.mark.parametrize(("eos_id", "adds_bos"), [(2, True), (1, True), (2, False)])
@pytest.mark.parametrize("workers", [1, 2])
def test_parts_whose_keys_say_nothing_of_ids_are_known_by_their_documents(
    make_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    eos_id: int,
    adds_bos: bool,
    workers: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As versions wrote them that knew a tokenizer by its vocabulary alone."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        former = make_job()
        del former.known["ids"]
        with pytest.raises(KeyboardInterrupt):
            former.run(1)
    assert "ids" not in json.loads((former.partial / "settings.json").read_text())
    job = make_job()
    job.tokenizer.adds_bos = adds_bos
    job = ending_with(job, eos_id)
    with monkeypatch.context() as patch:
        ran = stop_after(patch, FILES, AssertionError())
        job.run(workers)
    same = (eos_id, adds_bos) == (2, True)
    assert workers == 2 or ran == list(range(2 if same else 0, FILES))
    assert ("made again" in capfd.readouterr().err) != same
    ending_with(make_job("whole"), eos_id).run(1)
    assert files_of(job.output) == files_of(make_job("whole").output)


def test_a_tokenizer_on_the_hub_that_moved_says_what_it_was(
    make_job: Callable[..., Job],
    tiny_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_tokenizer, other)
    file = other / "tokenizer_config.json"
    file.write_text(file.read_text().replace("</s>", "<s>"))
    cache = tmp_path / "hub"
    first, same, second = write_hub_model(cache, tiny_tokenizer, tiny_tokenizer, other)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def start(name: str = "acme/tiny", **settings: object) -> bool:
        job = make_job(**settings)
        files = [Path(name) for task in job.tasks for name, _ in task.files]
        return Job(files, job.settings, load_tokenizer(name), job.output).run(1)[1]

    assert start()
    move_hub_model(cache, same)
    assert not start()
    move_hub_model(cache, second)
    was = rf"acme/tiny was revision {first}: give --tokenizer acme/tiny@{first}\. Use"
    with pytest.raises(InputError, match=rf"\(eos_token\): 2 there, 1 now\. {was} another"):
        start()
    assert not start(f"acme/tiny@{first}")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            start(f"acme/tiny@{first}", output="stopped")
    with pytest.raises(InputError, match=rf"unfinished job .*{was} those to finish"):
        start(output="stopped")
