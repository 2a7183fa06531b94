"""The order of batches does not depend on the number of ranks or on a resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.batches import BatchStream
from data.errors import InputError
from data.reader import TokenReader
from data.sampler import DomainSampler
from tests.data.helpers import random_documents, write_folder

WEIGHTS = {"c4": 0.7, "book": 0.3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(
        tmp_path,
        {"c4": [random_documents([400])], "book": [random_documents([100], seed=1)]},
    )
    return tmp_path


def make(folder: Path, rank: int = 0, world: int = 1, global_batch: int = 8) -> BatchStream:
    reader = TokenReader(folder, 10)
    sampler = DomainSampler(reader.sizes, WEIGHTS, 3, reader.fingerprint)
    return BatchStream(reader, sampler, global_batch, rank, world)


def global_batches(folder: Path, world: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    streams = [make(folder, rank, world) for rank in range(world)]
    batches = [stream.next() for _ in range(steps) for stream in streams]
    return (
        np.concatenate([batch.ids for batch in batches]),
        np.concatenate([batch.domains for batch in batches]),
    )


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_together_read_the_same_batches_for_every_world_size(
    folder: Path, world: int
) -> None:
    ids, domains = global_batches(folder, 1, 12)
    split_ids, split_domains = global_batches(folder, world, 12)
    assert np.array_equal(split_ids, ids) and np.array_equal(split_domains, domains)


def test_rows_hold_the_planned_samples(folder: Path) -> None:
    stream = make(folder)
    plan = DomainSampler(stream.reader.sizes, WEIGHTS, 3, stream.reader.fingerprint).next_batch(8)
    batch = stream.next()
    assert batch.step == 0 and batch.ids.shape == (8, 10) and batch.valid is None
    assert batch.ids.dtype == batch.domains.dtype == np.int64
    assert batch.domains.tolist() == plan[:, 0].tolist()
    for row, (domain, _, sample) in zip(batch.ids, plan, strict=True):
        expected = stream.reader.read(stream.domains[domain], np.array([sample]))[0]
        assert np.array_equal(row, expected)


def test_resume_with_another_world_size_continues_the_sequence(folder: Path) -> None:
    stream = make(folder)
    for _ in range(5):
        stream.next()
    stream.set_weights({"c4": 0.2, "book": 0.8})
    state = json.loads(json.dumps(stream.state_dict()))
    ranks = [make(folder, rank, 4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(state)
    for _ in range(5):
        expected = stream.next()
        found = [rank.next() for rank in ranks]
        assert all(batch.step == expected.step for batch in found)
        assert np.array_equal(np.concatenate([batch.ids for batch in found]), expected.ids)


def test_new_epoch_is_announced_once_and_only_by_rank_zero(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, other = make(folder), make(folder, 1, 2)
    assert stream.epochs == {"c4": 0, "book": 0}
    for _ in range(5):  # 12 of 10 samples of book
        stream.next()
    printed = capsys.readouterr().err
    assert printed.count("domain book starts epoch 2 (10 samples per epoch)") == 1
    assert "c4" not in printed
    assert stream.epochs == {"c4": 0, "book": 1}
    for _ in range(5):
        other.next()
    assert capsys.readouterr().err == ""
    resumed = make(folder)
    resumed.load_state_dict(stream.state_dict())
    resumed.next()
    assert "epoch" not in capsys.readouterr().err


def test_state_of_other_data_is_refused(folder: Path) -> None:
    state = make(folder).state_dict()
    state["sampler"]["fingerprint"] = "other"
    with pytest.raises(InputError, match="fingerprint"):
        make(folder).load_state_dict(state)
