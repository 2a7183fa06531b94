"""A command on several ranks of this machine, as torchrun starts them but quieter and more patient.

torchrun's agent ends the ranks 30 seconds after a signal, saved or not, hides their exit status,
and prints a traceback of its own where one of them refuses its input. What it is made of, torch's
elastic processes and a store for the ranks to meet at, is used here without it.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistNetworkError, TCPStore
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    PContext,
    SignalException,
    start_processes,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from data.cli import INTERRUPTED, STOPPED
from data.errors import InputError
from data.log import logger
from data.machine import LAUNCHED
from data.pipes import INTO_A_FILE, is_of_a_shell
from launch.commands import child_environment

HOST = "127.0.0.1"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_OF_ONE_CAUSE = 5
EXPECTED_DEATHS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)
"""Of ranks that the launcher ends after another one failed, or that a user ends, of which the ranks
themselves say what is kept."""
KNOWN_STATUSES = (2, STOPPED, INTERRUPTED)
"""Of an InputError, of a run that saved and of Ctrl-C: the cause, where other ranks died of other
things meanwhile."""


def start_ranks(number: int, words: list[str]) -> int:
    """Runs `shorn WORDS` on `number` ranks; the exit status.

    Signals that ask for a stop are passed on to the ranks, which take the time they need. Raises
    InputError where there are fewer GPUs than ranks, and for what the ranks could not open.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < number:
        raise InputError(f"--ranks {number}: this machine has {gpus} GPUs; use --ranks {gpus}")
    if LAUNCHED in os.environ:
        raise InputError(f"--ranks {number}: torchrun has started ranks already; leave one of both")
    for word in words:
        if is_of_a_shell(word.rpartition("=")[2]):
            raise InputError(
                f"--ranks {number}: {word} is a pipe that the shell opened for this process alone, "
                f"and ranks are processes of their own; {INTO_A_FILE}"
            )
    try:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    except DistNetworkError:
        raise InputError(
            f"--ranks {number}: ranks meet at {HOST}, and this machine has no network to itself: "
            "bring it up, as root with `ip link set lo up`"
        ) from None
    # torch reports on its processes, and their failures, at warning and above.
    logging.disable(logging.CRITICAL)
    hang_up = signal.getsignal(signal.SIGHUP)
    context = None
    try:
        context = start_processes(
            name="shorn",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(number), ("-u", "-m", "launch.shorn", *words)),
            envs=_environments(number, store.port),
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        _forward_signals(context, hang_up)
        result = context.wait()
    except SignalException as stop:  # one that came before they are forwarded
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + stop.sigval
    finally:
        if context is not None:
            context.close()
        logging.disable(logging.NOTSET)
    assert result is not None
    _name_the_dead(list(result.failures.values()))
    return exit_status([failure.exitcode for failure in result.failures.values()])


def _name_the_dead(failures: list[ProcessFailure]) -> None:
    """Says which ranks the system ended, unless another one failed first and has said why."""
    first = min((failure.timestamp for failure in failures), default=0)
    # Those that failed later were ended by the launcher, which waits half a minute in between.
    causes = [failure for failure in failures if failure.timestamp - first < SECONDS_OF_ONE_CAUSE]
    if any(failure.exitcode > 0 for failure in causes):
        return
    for failure in causes:
        if failure.exitcode not in EXPECTED_DEATHS:
            name = signal.Signals(-failure.exitcode).name
            memory = ", most likely for want of memory" if name == "SIGKILL" else ""
            logger.error(
                f"rank {failure.local_rank} was ended by {name}{memory}; run the same command "
                "again, which goes on from what was saved, if anything was"
            )


def exit_status(failures: list[int]) -> int:
    """The status of a group, from those of its ranks that failed, the first one first.

    A rank that died of a signal has its negative number, and a shell adds 128 to it.
    """
    for status in KNOWN_STATUSES:
        if status in failures:
            return status
    first = failures[0] if failures else 0
    return first if first >= 0 else 128 - first


def _environments(number: int, port: int) -> dict[int, dict[str, str]]:
    """What torchrun gives each rank."""
    ours = child_environment()
    shared = {
        **{name: ours[name] for name in ("PYTHONPATH", "PYTHONSAFEPATH")},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(number),
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHED: uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "WORLD_SIZE": str(number),
    }
    return {
        rank: shared | dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
        for rank in range(number)
    }


def _forward_signals(context: PContext, hang_up: Any) -> None:
    """`hang_up` is what SIGHUP did before the ranks were started: nothing, under nohup."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM if number == signal.SIGHUP else number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if hang_up == signal.SIG_IGN else forward)
