"""How ranks find each other: a store at which all of them report, before anybody waits for long."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from data.errors import InputError, first_line
from data.log import logger
from data.machine import Group

MEETING_TIMEOUT = timedelta(minutes=5)
"""Ranks that were started together may come this far apart."""
SECONDS_IN_SILENCE = 20.0
"""Then rank 0 says for whom it waits."""
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_OF_A_TRY = 10.0


def meet(group: Group, gpu: str | None) -> dist.Store:
    """The store at which all ranks of `group` have arrived, for the process group to use.

    Args:
        group: what the environment says of the ranks.
        gpu: identity of this rank's GPU, which must be no other rank's; None without one.

    Raises InputError when the store cannot be reached or its port is taken, when ranks do not
    arrive within MEETING_TIMEOUT, when two processes are the same rank, or when ranks share a GPU.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"shorn/{attempt}", _reach(group))
    if store.add(f"rank/{group.rank}", 1) > 1:
        raise InputError(
            f"two processes say that they are rank {group.rank} at {_place(group)}: give each its "
            "own RANK, and each run its own MASTER_PORT"
        )
    place = f"gpu/{socket.gethostname()}/{gpu}"
    store.set(f"{place}/{store.add(place, 1)}", str(group.rank))
    store.add("arrived", 1)
    _wait_for_all(group, store)
    sharing = [store.get(f"{place}/{number + 1}").decode() for number in range(store.add(place, 0))]
    if gpu is not None and len(sharing) > 1:
        raise InputError(
            f"ranks {', '.join(sorted(sharing, key=int))} see one GPU, and each rank needs its "
            "own: start fewer ranks per machine (--nproc_per_node), or give each task another GPU "
            "(CUDA_VISIBLE_DEVICES)"
        )
    return store


def _reach(group: Group) -> dist.Store:
    # torchrun and `shorn --ranks` host the store themselves.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = group.rank == 0 and not hosted
    try:
        if not host:
            _knock(group)
        return dist.TCPStore(
            group.address,
            group.port,
            group.world,
            is_master=host,
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise InputError(
                f"MASTER_PORT={group.port} is in use on this machine, perhaps by another run; set "
                "another, the same for all ranks"
            ) from None
        raise InputError(
            f"rank {group.rank} of {group.world} cannot reach rank 0 at {_place(group)} within "
            f"{MEETING_TIMEOUT.total_seconds():.0f} s ({first_line(error)}); start rank 0 there, "
            "correct MASTER_ADDR and MASTER_PORT, or unset RANK to run one process"
        ) from None


def _knock(group: Group) -> None:
    """Waits until something listens where the ranks meet; PyTorch would print a page meanwhile."""
    deadline = time.monotonic() + MEETING_TIMEOUT.total_seconds()
    while True:
        try:
            socket.create_connection((group.address, group.port), timeout=SECONDS_OF_A_TRY).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _wait_for_all(group: Group, store: dist.Store) -> None:
    start, said = time.monotonic(), False
    while store.add("arrived", 0) < group.world:
        waited = time.monotonic() - start
        if waited > MEETING_TIMEOUT.total_seconds():
            raise InputError(
                f"{_missing(group, store)} did not come to {_place(group)} within {waited:.0f} s: "
                "start WORLD_SIZE processes with RANK 0, 1, ... (`shorn --ranks N` or torchrun "
                "does), or unset RANK to run one process"
            )
        if waited > SECONDS_IN_SILENCE and not said:
            said = True
            logger.warning(f"waiting at {_place(group)} for {_missing(group, store)}")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _missing(group: Group, store: dist.Store) -> str:
    ranks = [str(rank) for rank in range(group.world) if not store.check([f"rank/{rank}"])]
    named = ", ".join(ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"{len(ranks)} of {group.world} ranks ({named})"


def _place(group: Group) -> str:
    return f"{group.address}:{group.port}"
