"""The multi-rank helper: results in order, errors with rank and traceback, no hanging ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_ranks


def test_ranks_reduce_and_return_in_order() -> None:
    # Threads and autograd used before the fork must not hang the ranks.
    weight = torch.randn(512, 512, requires_grad=True)
    (weight @ weight).sum().backward()

    def body(scale: float) -> tuple[int, float, str]:
        value = torch.tensor(float(dist.get_rank())) * scale
        dist.all_reduce(value)
        local = torch.randn(64, 64, requires_grad=True)
        (local @ local).sum().backward()
        return dist.get_rank(), value.item(), os.environ["WORLD_SIZE"]

    assert run_ranks(body, 3, 2.0) == [(0, 6.0, "3"), (1, 6.0, "3"), (2, 6.0, "3")]


def test_error_names_the_rank() -> None:
    def body() -> None:
        if dist.get_rank() == 1:
            raise ValueError("only here")

    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 raised.*ValueError: only here"):
        run_ranks(body, 2)


def test_a_rank_that_dies_is_reported() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            os._exit(3)

    with pytest.raises(RankError, match="rank 0 died"):
        run_ranks(body, 2)


def test_hang_ends_at_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match="did not finish within 1 s"):
        run_ranks(lambda: time.sleep(60), 2, timeout=1.0)
    assert time.monotonic() - started < 20
