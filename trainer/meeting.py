"""How ranks find each other: a store at which all of them report, before anybody waits for long."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from data.errors import InputError, first_line
from data.log import logger
from data.machine import Group

MEETING_TIMEOUT = timedelta(minutes=5)
"""Ranks that were started together may come this far apart."""
FIRST_LOOK = timedelta(seconds=20)
"""After this time rank 0 says for whom it waits."""


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
    store.set(f"arrived/{group.rank}", "")
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
    try:
        return dist.TCPStore(
            group.address,
            group.port,
            group.world,
            is_master=group.rank == 0 and not hosted,
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
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


def _wait_for_all(group: Group, store: dist.Store) -> None:
    names = [f"arrived/{rank}" for rank in range(group.world)]
    for patience in (min(FIRST_LOOK, MEETING_TIMEOUT), MEETING_TIMEOUT):
        try:
            store.wait(names, patience)
            return
        except RuntimeError:
            missing = [str(rank) for rank in range(group.world) if not store.check([names[rank]])]
            which = f"{len(missing)} of {group.world} ranks ({', '.join(missing[:8])}"
            which += ", ...)" if len(missing) > 8 else ")"
            if patience < MEETING_TIMEOUT:
                logger.warning(f"waiting at {_place(group)} for {which}")
    raise InputError(
        f"{which} did not come to {_place(group)} within {MEETING_TIMEOUT.total_seconds():.0f} s: "
        "start WORLD_SIZE processes with RANK 0, 1, ... (`shorn --ranks N` or torchrun does), or "
        "unset RANK to run one process"
    )


def _place(group: Group) -> str:
    return f"{group.address}:{group.port}"
