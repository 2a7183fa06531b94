"""Run a test function on several CPU ranks: `run_ranks(function, world, *args)`.

Ranks are forked from the test process, which has already imported torch and torch._dynamo (an
optimizer's first step imports it lazily, seconds per process), so eight ranks start in well under a
second and `function` may be a closure.
"""

import gc
import importlib
import os
import pickle
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its number and traceback."""


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Call `function(*args)` on `world` forked gloo ranks and return the results in rank order.

    The process group is initialised and torchrun's environment variables are set; `function` finds
    its rank with `torch.distributed.get_rank()`. Each rank uses one thread. Results must be
    picklable. Raises RankError for the first rank that fails or when `timeout` (seconds) has
    passed; all ranks are gone when this returns.
    """
    importlib.import_module("torch._dynamo")
    # Destroying a process group left in a reference cycle joins its threads, which a fork lacks.
    gc.collect()
    context = get_context("fork")
    # No port to meet at: another process may take it between the search and its use.
    meeting = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
    processes: list[BaseProcess] = []
    readers: list[Connection] = []
    try:
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(writer, function, rank, world, meeting, args), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        results = _collect(readers, time.monotonic() + timeout, timeout)
        for started in processes:
            started.join(timeout=5)
        return results
    finally:
        for started in processes:
            started.kill()
            started.join()
        for reader in readers:
            reader.close()
        shutil.rmtree(meeting.parent, ignore_errors=True)


def _rank_main(
    writer: Connection,
    function: Callable[..., Any],
    rank: int,
    world: int,
    meeting: Path,
    args: tuple[Any, ...],
) -> None:
    gc.freeze()
    try:
        torch.set_num_threads(1)
        os.environ.update(
            OMP_NUM_THREADS="1",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="1",
        )
        store = dist.FileStore(str(meeting), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        payload = pickle.dumps(answer)
    except Exception:
        payload = pickle.dumps((False, f"the result cannot be sent:\n{traceback.format_exc()}"))
    writer.send_bytes(payload)
    writer.close()
    if answer[0] and dist.is_initialized():
        dist.destroy_process_group()
    # No interpreter shutdown: pytest's inherited exit handlers and buffers belong to the parent.
    os._exit(0)


def _collect(readers: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(waiting.values())
            raise RankError(f"ranks {missing} did not finish within {timeout:.0f} s")
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = waiting.pop(reader)
            try:
                succeeded, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without an answer") from None
            if not succeeded:
                raise RankError(f"rank {rank} of {len(readers)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]
