"""What launchers, ulimits and control groups say of this process, and what is made of it."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import machine
from data.errors import InputError
from tests.conftest import ROOT

GROUP = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*machine.GROUP_VARIABLES, *machine.TASKS, machine.LAUNCHED, machine.PARENT):
        monkeypatch.delenv(name, raising=False)


def launch(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in (GROUP | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


def test_a_group_as_torchrun_describes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.group() is None and machine.rank() == 0
    launch(monkeypatch)
    assert machine.group() == machine.Group(1, 4, 1, 2, "10.0.0.1", 29500)
    assert machine.rank() == 1
    launch(monkeypatch, LOCAL_RANK=None, LOCAL_WORLD_SIZE="")
    assert machine.group() == machine.Group(1, 4, None, None, "10.0.0.1", 29500)


def test_what_says_nothing_of_ranks_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, RANK=None, LOCAL_RANK="x")
    assert machine.group() is None
    launch(monkeypatch, RANK="")
    assert machine.group() is None
    # Nobody to meet: no address is needed.
    launch(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    launch(monkeypatch, MASTER_ADDR=None, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert machine.group() == machine.Group(0, 1, 0, 1, "", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "abc"}, "RANK=abc: must be a whole number of at least 0; to run one process, "),
        ({"RANK": "-1"}, "RANK=-1: must be a whole number"),
        ({"RANK": "1.0"}, "RANK=1.0: must be a whole number"),
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4; "),
        ({"WORLD_SIZE": None}, "RANK=1 is set but WORLD_SIZE is not; to run one process, unset"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number of at least 1"),
        ({"MASTER_ADDR": None}, "RANK=1 is set but MASTER_ADDR is not; to run one process, unset"),
        ({"MASTER_PORT": None}, "RANK=1 is set but MASTER_PORT is not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be at most 65535"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: must be a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": None}, "LOCAL_RANK=4 is not below WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 is above WORLD_SIZE=4"),
    ],
)
def test_contradictions_are_named(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, **changes)
    with pytest.raises(InputError) as caught:
        machine.group()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("changes", [{"RANK": "abc"}, {"WORLD_SIZE": None}, {"MASTER_ADDR": None}])
def test_who_is_in_no_group_speaks_for_itself(
    changes: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, **changes)
    assert machine.rank() == 0


def test_a_command_that_runs_alone_hands_no_ranks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    machine.stand_alone()
    assert machine.group() is None and not set(GROUP) & set(os.environ)


def control_groups(monkeypatch: pytest.MonkeyPatch, folder: Path, own: str) -> Path:
    (folder / "own").write_text(own)
    monkeypatch.setattr(machine, "OWN_GROUPS", folder / "own")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", folder / "top")
    return folder / "top"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def smallest() -> tuple[int, str]:
    size, owner, _ = min(machine.memory_limits())
    return size, owner


def test_version_2_groups_and_those_around_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = control_groups(monkeypatch, tmp_path, "0::/jobs/mine\n")
    write(top / "jobs" / "mine" / "memory.max", "max")
    assert smallest()[1] == "the machine"
    write(top / "jobs" / "memory.max", "1000000")
    assert smallest() == (10**6, f"the control group ({top}/jobs/memory.max)")
    write(top / "jobs" / "mine" / "memory.max", "999999")
    assert smallest()[0] == 999_999
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(top / "jobs" / "mine" / "cpu.max", "max 100000")
    assert machine.available_cores() == 8
    write(top / "jobs" / "cpu.max", "250000 100000")
    assert machine.available_cores() == 2
    write(top / "jobs" / "mine" / "cpu.max", "50000 100000")
    assert machine.available_cores() == 1


def test_version_1_groups_of_a_container_that_sees_only_its_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "5:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123\n3:cpuset:/docker/0123\n"
    top = control_groups(monkeypatch, tmp_path, own)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    write(top / "memory" / "memory.limit_in_bytes", str(2**63 - 4096))
    write(top / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1")
    write(top / "cpu,cpuacct" / "cpu.cfs_period_us", "100000")
    assert (smallest()[1], machine.available_cores()) == ("the machine", 8)
    write(top / "memory" / "memory.limit_in_bytes", "5000")
    write(top / "cpu,cpuacct" / "cpu.cfs_quota_us", "300000")
    assert (smallest()[0], machine.available_cores()) == (5000, 3)


def test_a_machine_without_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.available_cores() == 7
    assert "the machine" in [owner for _, owner, _ in machine.memory_limits()]


def test_a_limit_of_the_process_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 5000, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits[number], -1))
    assert min(machine.memory_limits()) == (5000, "the process (`ulimit -v`)", False)


CHILD = """
import os, time
from data import machine
machine.SECONDS_BETWEEN_LOOKS = 0.05
machine.end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""
STARTER = """
import os, subprocess, sys, time
if sys.argv[2]:
    os.environ[sys.argv[2]] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


@pytest.mark.parametrize("variable", [machine.LAUNCHED, machine.PARENT, ""])
def test_nobody_outlives_the_launcher_that_was_killed(variable: str) -> None:
    """But a process that a user started from a shell does."""
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTER, CHILD, variable],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (10 if variable else 0.5)
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    alive = time.monotonic() >= deadline
    if alive:
        os.kill(child, signal.SIGKILL)
    parent.stdout.close()
    assert alive == (variable == "")


def test_the_number_of_another_process_is_no_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grandchild inherits the variable, but its own parent is another."""
    started: list[object] = []
    monkeypatch.setattr(machine.threading, "Thread", lambda **options: started.append(options))
    monkeypatch.setenv(machine.PARENT, "1" if os.getppid() != 1 else "2")
    machine.end_with_parent()
    assert not started


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks (SLURM_STEP_NUM_TASKS)"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 tasks"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_NTASKS": "8"}, ""),  # a batch script, which runs once
        ({"SLURM_STEP_NUM_TASKS": "8", "RANK": "0"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "2", machine.LAUNCHED: "x"}, ""),
    ],
)
def test_tasks_that_do_not_know_their_rank(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = machine.tasks_without_ranks()
    assert found.startswith(said) and bool(found) == bool(said)
