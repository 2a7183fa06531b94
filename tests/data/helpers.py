"""Token folders written shard by shard, jobs that stop early, and environments of ranks."""

from pathlib import Path

import numpy as np
import pytest

from data.manifest import HELD_OUT, TRAIN, Manifest, ShardRecord, TokenizerRecord, dtype_for
from data.shards import ShardWriter
from data.tasks import TaskRun

FILES = 6
"""Input files of the fixture `make_job`."""


def write_shard(root: Path, path: str, documents: list[np.ndarray], dtype: str) -> ShardRecord:
    writer = ShardWriter(root, path, dtype)
    for document in documents:
        writer.append(document, text_bytes=3 * len(document))
    return writer.commit()


def write_folder(root: Path, domains: dict[str, list[list[np.ndarray]]]) -> Manifest:
    """`domains[name][shard]` is the list of documents of one training shard."""
    tokenizer = TokenizerRecord(
        kind="sentencepiece",
        fingerprint="0" * 64,
        vocab_size=1000,
        bos_id=1,
        eos_id=2,
        adds_bos=True,
        probe=[5, 6, 7],
    )
    dtype = dtype_for(tokenizer.vocab_size)
    shards = {
        domain: [
            write_shard(root, f"{TRAIN}/{domain}/{index:05d}", documents, dtype)
            for index, documents in enumerate(groups)
        ]
        for domain, groups in domains.items()
    }
    manifest = Manifest(
        dtype=dtype,
        tokenizer=tokenizer,
        splits={TRAIN: shards, HELD_OUT: {}},
        sources=[],
        arguments={},
    )
    manifest.save(root / "manifest.json")
    return manifest


def random_documents(lengths: list[int], vocab_size: int = 1000, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab_size, length) for length in lengths]


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


def group(rank: int) -> dict[str, str]:
    """The environment of a rank, as torchrun makes it."""
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return here | {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": str(rank)}


def join(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in group(rank).items():
        monkeypatch.setenv(name, value)
