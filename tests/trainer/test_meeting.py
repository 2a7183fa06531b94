"""Ranks meet at a store, or say within a stated time who is missing and why."""

import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from data.errors import InputError
from data.machine import Group
from trainer import meeting
from trainer.meeting import meet


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(meeting, "SECONDS_IN_SILENCE", 0.3)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC")]:
        monkeypatch.delenv(name)


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    yield number


def group(rank: int, world: int, port: int, address: str = "127.0.0.1") -> Group:
    return Group(rank, world, rank, world, address, port)


def meet_all(groups: list[Group], gpus: list[str | None]) -> list[dist.Store | InputError]:
    """What comes of it when each of `groups` arrives in a thread of its own."""
    outcomes: dict[int, dist.Store | InputError] = {}

    def arrive(number: int) -> None:
        try:
            outcomes[number] = meet(groups[number], gpus[number])
        except InputError as error:
            outcomes[number] = error

    threads = [threading.Thread(target=arrive, args=(number,)) for number in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[number] for number in range(len(groups))]


def test_all_meet(port: int) -> None:
    stores = meet_all([group(rank, 3, port) for rank in range(3)], [None] * 3)
    assert all(isinstance(store, dist.Store) for store in stores), stores


def test_each_rank_may_see_one_gpu_of_its_own(port: int) -> None:
    stores = meet_all([group(rank, 2, port) for rank in range(2)], ["GPU-a", "GPU-b"])
    assert all(isinstance(store, dist.Store) for store in stores), stores


def test_ranks_that_share_a_gpu_are_named(port: int) -> None:
    outcomes = meet_all([group(rank, 3, port) for rank in range(3)], ["GPU-a", "GPU-b", "GPU-a"])
    assert "ranks 0, 2 see one GPU" in str(outcomes[0]) and str(outcomes[2]) == str(outcomes[0])


def test_who_does_not_come_is_named(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = meet_all([group(0, 4, port), group(2, 4, port)], [None] * 2)
    assert str(first).startswith(f"2 of 4 ranks (1, 3) did not come to 127.0.0.1:{port} within 1 s")
    assert str(last) == str(first) and "unset RANK to run one process" in str(last)
    assert f"waiting at 127.0.0.1:{port} for 2 of 4 ranks (1, 3)" in capsys.readouterr().err


def test_a_rank_zero_that_is_not_there(port: int) -> None:
    (outcome,) = meet_all([group(1, 2, port)], [None])
    assert f"rank 1 of 2 cannot reach rank 0 at 127.0.0.1:{port} within 1 s" in str(outcome)
    assert "Connection refused" in str(outcome)


def test_a_host_that_has_no_address(port: int) -> None:
    (outcome,) = meet_all([group(1, 2, port, "nowhere.invalid")], [None])
    assert f"cannot reach rank 0 at nowhere.invalid:{port}" in str(outcome)


def test_a_port_in_use_is_named(port: int) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        (outcome,) = meet_all([group(0, 2, port)], [None])
    assert str(outcome).startswith(f"MASTER_PORT={port} is in use on this machine")


def test_one_rank_given_to_two_processes(port: int) -> None:
    """As where two runs were started with one MASTER_PORT."""
    outcomes = meet_all([group(0, 2, port), group(1, 2, port), group(1, 2, port)], [None] * 3)
    refused = [str(outcome) for outcome in outcomes[1:] if isinstance(outcome, InputError)]
    assert len(refused) == 1 and refused[0].startswith("two processes say that they are rank 1")
