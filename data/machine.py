"""Where this process runs: its rank among its peers, and the cores and memory it may use."""

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError

GROUP_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""What a launcher tells each of the ranks it starts."""
LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Set where the parent of this process is a launcher: torchrun, or `shorn --ranks`."""
TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""What tells the number of tasks that a program started which says nothing of ranks."""
PARENT = "SHORN_PARENT"
"""Number of the process that this one must not outlive, set by a command that starts others."""
OWN_GROUPS = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_SAVE = 600.0
"""What a process whose parent is gone may take to save and end."""


@dataclass(frozen=True, slots=True)
class Group:
    """What the launcher's environment variables say of this process and its peers."""

    rank: int
    world: int
    local_rank: int | None
    """Rank on this machine; None where nobody says."""
    local_world: int | None
    """Ranks on this machine; None where nobody says."""
    address: str
    """Where the ranks meet: host and port of rank 0's store. "" in a group of one that has none."""
    port: int


def group() -> Group | None:
    """The group that a launcher started this process in; None where RANK is not set.

    Raises InputError for variables that contradict each other or say too little, naming them.
    """
    if not os.environ.get("RANK"):
        return None
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if rank is None or world is None:
        raise InputError(f"RANK={rank} is set but WORLD_SIZE is not; {_REMEDY}")
    if rank >= world:
        raise InputError(f"RANK={rank} is not below WORLD_SIZE={world}; {_REMEDY}")
    local_rank, local_world = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if local_world is not None and local_world > world:
        raise InputError(f"LOCAL_WORLD_SIZE={local_world} is above WORLD_SIZE={world}; {_REMEDY}")
    if local_rank is not None and local_rank >= (local_world or world):
        limit = f"LOCAL_WORLD_SIZE={local_world}" if local_world else f"WORLD_SIZE={world}"
        raise InputError(f"LOCAL_RANK={local_rank} is not below {limit}; {_REMEDY}")
    address, port = os.environ.get("MASTER_ADDR", "").strip(), _number("MASTER_PORT", 0)
    if world == 1 and not address:
        port = 0  # nobody to meet
    elif not address or port is None:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise InputError(f"RANK={rank} is set but {missing} is not; {_REMEDY}")
    elif port > 65535:
        raise InputError(f"MASTER_PORT={port}: must be at most 65535; {_REMEDY}")
    return Group(rank, world, local_rank, local_world, address, port)


_REMEDY = (
    "to run one process, unset RANK; to run several, start them with `shorn --ranks N` or torchrun"
)


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"{name}={text}: must be a whole number of at least {least}; {_REMEDY}")
    return int(text)


def rank() -> int:
    """This process's rank in the group its launcher started; 0 without a launcher.

    0 too where the environment names no group that can be: then every process speaks for itself.
    """
    return _place()[0]


def world() -> int:
    """Number of ranks of that group; 1 without one."""
    return _place()[1]


def _place() -> tuple[int, int]:
    texts = [os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE")]
    if not all(map(str.isdecimal, texts)) or not os.environ.get("MASTER_ADDR"):
        return 0, 1
    own, ranks = map(int, texts)
    return (own, ranks) if own < ranks else (0, 1)


def tasks_without_ranks() -> str:
    """What is wrong and helps where this process is one of several tasks of srun or mpirun, none of
    which knows its rank; empty elsewhere."""
    if os.environ.get("RANK") or os.environ.get(LAUNCHED):
        return ""
    for name, program in TASKS.items():
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            return (
                f"{program} started {text} tasks ({name}) and RANK is not set, so each runs "
                "apart; start one task per machine, for training and evaluation on all of it with "
                "`shorn --ranks N` (one machine) or torchrun (several) in the task"
            )
    return ""


def stand_alone() -> None:
    """Forgets what the environment says of other ranks: this command, and those that it starts,
    run as one process. Cluster systems set these variables for every process of a job."""
    for name in GROUP_VARIABLES:
        os.environ.pop(name, None)


def end_with_parent() -> None:
    """Has this process end when the launcher or command that started it is gone, even killed.

    It gets a SIGTERM then, on which a training run saves and ends. Nothing happens in a process
    that a user started.
    """
    parent = os.getppid()
    if os.environ.get(LAUNCHED) or os.environ.get(PARENT) == str(parent):
        end_with(parent)


def end_with(parent: int) -> None:
    """Has this process get a SIGTERM when its parent, the process `parent`, is gone."""

    # The system's own death signal would come when the *thread* that started this process ends.
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(SECONDS_TO_SAVE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def available_cores() -> int:
    """CPU cores this process may use: those of its affinity and of its control groups' quotas; all
    of the machine's where the system does not tell."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [_cores_of_quota(folder) for folder in _control_groups("cpu")]
    return max(1, min([cores or 1, *(int(quota) for quota in quotas if quota is not None)]))


def memory_limits() -> list[tuple[int, str, bool]]:
    """What bounds the memory of this process: (bytes, what sets this limit, whether the limit is
    for all processes of this machine or group together)."""
    limits = [
        (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "the machine", True),
    ]
    for number, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            limits.append((soft, f"the process (`{name}`)", False))
    for folder in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _content(folder / name)
            if text.isdecimal():
                limits.append((int(text), f"the control group ({folder / name})", True))
    return limits


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those around it, in both versions' layouts.

    In a container the group's own folder may be out of sight; its limits then stand at the top.
    """
    for line in _content(OWN_GROUPS).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = CONTROL_GROUPS / controllers
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _cores_of_quota(folder: Path) -> float | None:
    quota, _, period = _content(folder / "cpu.max").partition(" ")
    if not period:
        quota = _content(folder / "cpu.cfs_quota_us")
        period = _content(folder / "cpu.cfs_period_us")
    # "max" or "-1" is no limit.
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return int(quota) / int(period)
    return None


def _content(path: Path) -> str:
    with contextlib.suppress(OSError):
        return os.fsdecode(path.read_bytes()).strip()
    return ""
