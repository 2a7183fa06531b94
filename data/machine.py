"""Where this process runs: its rank among its peers, and the cores it may use."""

import os


def rank() -> int:
    """This process's rank in the group its launcher started; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


def available_cores() -> int:
    """CPU cores this process may use; all of the machine's where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
