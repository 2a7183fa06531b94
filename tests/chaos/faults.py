"""What disturbed runs meet: kills, signals, full disks, damage, and other runs in their folder."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import InputError
from data.manifest import Manifest
from data.reader import TokenReader
from tests.chaos.processes import Command, Machine, Started, nobody_left, until

STEP_FOLDER = "step-[0-9]*"
SECONDS_FOR_A_MOMENT = 60.0


@dataclass(frozen=True, slots=True)
class Moment:
    """When a fault strikes a running command: `delay` seconds after `name` is true of it."""

    name: str
    """"start", "step 7", "save", "export", "task 2", "shard"."""
    delay: float

    def wait(self, started: Started) -> bool:
        """Whether the moment came before the command had ended."""
        output = started.command.output
        came = until(
            lambda: self._is_now(started, output) or not started.running, SECONDS_FOR_A_MOMENT
        )
        time.sleep(self.delay)
        return came and started.running

    def _is_now(self, started: Started, output: Path) -> bool:
        kind, _, number = self.name.partition(" ")
        if not started.began:
            return False
        if kind == "step":
            return _lines(output / "metrics.jsonl") >= int(number)
        if kind == "save":
            return _any_new((output / "checkpoints").glob(".step-*"), started)
        if kind == "export":
            names = ("masks.safetensors", "model*", ".model*")
            return any(_any_new(output.glob(name), started) for name in names)
        if kind == "task":
            return len(list(output.glob(".partial/tasks/*.json"))) >= int(number)
        if kind == "shard":
            return _any_new((output / ".partial").rglob("*.tmp"), started)
        return True


def moments(rng: random.Random, command: Command, steps: int) -> Moment:
    """A random moment of a command's life."""
    delay = rng.choice((0.0, rng.uniform(0.0, 0.03), rng.uniform(0.0, 0.3)))
    if command.name == "tokenize":
        names = ["start", "shard", f"task {rng.randrange(1, 5)}"]
    else:
        names = ["start", "save", "save", "export", f"step {rng.randrange(1, steps + 1)}"]
    return Moment(rng.choice(names), delay)


def _any_new(paths: Iterator[Path], started: Started) -> bool:
    """Whether one of the paths was made or changed since the command was started."""
    try:
        return any(path.lstat().st_mtime > started.at for path in paths)
    except OSError:  # it was there a moment ago
        return True


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


@dataclass(frozen=True, slots=True)
class Struck:
    """What a fault did."""

    text: str
    """For people."""
    backup: dict[Path, bytes]
    """Files as they were, for a user who has a copy."""


Damage = Callable[[Path, random.Random], Struck | None]
"""Damages an output folder; None where there is nothing of that kind to damage."""


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run."""
    found = sorted((output / "checkpoints").glob(STEP_FOLDER))
    return found[-1] if found else None


def flip_in_checkpoint(output: Path, rng: random.Random) -> Struck | None:
    """A bit of one of the newest checkpoint's files."""
    return _in_checkpoint(output, rng, _flip)


def cut_in_checkpoint(output: Path, rng: random.Random) -> Struck | None:
    """One of the newest checkpoint's files, cut off somewhere."""
    return _in_checkpoint(output, rng, _cut)


def empty_in_checkpoint(output: Path, rng: random.Random) -> Struck | None:
    """One of the newest checkpoint's files, emptied."""
    return _in_checkpoint(output, rng, lambda path, rng: path.write_bytes(b"") and None)


def remove_in_checkpoint(output: Path, rng: random.Random) -> Struck | None:
    """One of the newest checkpoint's files, removed."""
    return _in_checkpoint(output, rng, lambda path, rng: path.unlink())


def _in_checkpoint(
    output: Path, rng: random.Random, change: Callable[[Path, random.Random], object]
) -> Struck | None:
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        return None
    path = rng.choice(sorted(checkpoint.iterdir()))
    backup = {path: path.read_bytes()}
    change(path, rng)
    return Struck(f"{checkpoint.name}/{path.name}", backup)


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def rename_checkpoint(output: Path, rng: random.Random) -> Struck | None:
    """The newest checkpoint under another name."""
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        return None
    name = rng.choice(("step-00000099", "step-latest", "step-1", "step-00000003.bak"))
    checkpoint.rename(checkpoint.with_name(name))
    return Struck(f"{checkpoint.name} -> {name}", {})


def remove_checkpoints(output: Path, rng: random.Random) -> Struck | None:
    """All checkpoints, gone."""
    if newest_checkpoint(output) is None:
        return None
    shutil.rmtree(output / "checkpoints")
    return Struck("checkpoints/ is gone", {})


def put_foreign_checkpoint(foreign: Path) -> Damage:
    """A checkpoint of the run in `foreign`, of another seed, as the newest one or in its place."""

    def put(output: Path, rng: random.Random) -> Struck | None:
        own, other = newest_checkpoint(output), newest_checkpoint(foreign)
        if own is None or other is None:
            return None
        if rng.random() < 0.5:
            shutil.rmtree(own)
            place = own
        else:
            place = own.with_name(other.name)
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(other, place)
        return Struck(f"another run's {other.name} as {place.name}", {})

    return put


def leave_partial_checkpoint(output: Path, rng: random.Random) -> Struck | None:
    """What a save leaves that was cut short, and a folder of the user's own."""
    folder = output / "checkpoints" / ".step-00000005.partial"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.pt").write_bytes(rng.randbytes(100))
    return Struck("a half-written checkpoint", {})


def damage_record(output: Path, rng: random.Random) -> Struck | None:
    """One of the small files of a run or of tokenizing: emptied, cut, not JSON, or other JSON."""
    names = (
        *("run.json", "metrics.jsonl", "history.jsonl", "source.safetensors", "reference.json"),
        *("shear.json", "cpt.json", "finetune.json", "manifest.json", ".lock"),
    )
    found = [output / name for name in names if (output / name).is_file()]
    found += [
        *output.glob(".partial/settings.json"),
        *output.glob(".partial/tasks/*.json"),
        *output.glob(".partial/lock"),
    ]
    if not found:
        return None
    path = rng.choice(sorted(found))
    content = path.read_bytes()
    kinds: dict[str, bytes | None] = {
        "emptied": b"",
        "cut": content[: rng.randrange(max(1, len(content)))],
        "not JSON": b"{broken\n",
        "a list": b"[]\n",
        "not UTF-8": content + b"\xff\xfe\n",
        "removed": None,
    }
    kind = rng.choice(sorted(kinds))
    changed = kinds[kind]
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    return Struck(f"{path.relative_to(output)} {kind}", {path: content})


def damage_shard(output: Path, rng: random.Random) -> Struck | None:
    """A bit of a shard, finished or not."""
    found = sorted(
        path
        for path in output.rglob("*")
        if path.suffix in (".bin", ".idx", ".crc") and path.stat().st_size
    )
    if not found:
        return None
    path = rng.choice(found)
    backup = {path: path.read_bytes()}
    _flip(path, rng)
    return Struck(f"{path.relative_to(output)} flipped", backup)


def leave_temporary_shard(output: Path, rng: random.Random) -> Struck | None:
    """What a worker leaves that was killed."""
    folder = output / ".partial" / "train" / "alpha"
    if not folder.is_dir():
        return None
    (folder / "00000.bin.99.tmp").write_bytes(rng.randbytes(50))
    return Struck("a half-written shard", {})


def kill_worker(started: Started, rng: random.Random) -> bool:
    """kill -9 of a worker process of tokenizing; whether there was one."""
    workers = [
        pid
        for pid in started.descendants()
        if pid not in started.pids and b"resource_tracker" not in _command_line(pid)
    ]
    if workers:
        started.send(signal.SIGKILL, [rng.choice(workers)])
    return bool(workers)


def kill_launched_rank(started: Started, rng: random.Random) -> bool:
    """kill -9 of a rank that a launcher started; whether there was one."""
    ranks = [pid for pid in started.descendants() if pid not in started.pids]
    if ranks:
        started.send(signal.SIGKILL, [rng.choice(ranks)])
    return bool(ranks)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def start_twice(machine: Machine, started: Started) -> str | None:
    """Starts the same command beside the one that runs, and waits for both; what is wrong with
    their answers: one is refused, unless the other was over before it looked."""
    second = machine.start(started.command)
    with nobody_left(second):
        status = second.wait()
        late = not started.running
    pair = [(started.wait(), started.text), (status, second.text)]
    refused = [text for status, text in pair if status == 2 and "another process" in text]
    done = [status for status, _ in pair if status == 0]
    if (len(refused), len(done)) == (1, 1) or (late and len(done) == 2):
        return None
    if started.text.startswith("error") and status in (0, 2):
        return None  # an earlier damage is still there, and is named
    return "\n".join(f"one of two starts ended with {s}:\n{t[-1500:]}" for s, t in pair)


def reading_problem(tokens: Path) -> str | None:
    """What a reader says that reads a whole token folder; None where it finds nothing wrong."""
    try:
        for split in Manifest.load(tokens).splits:
            reader = TokenReader(tokens, 32, split)
            for domain in reader.domains:
                reader.read(domain, np.arange(reader.sizes[domain]))
                for shard in reader._shards[domain]:
                    shard.documents()
    except InputError as error:
        return str(error)
    return None


def is_json(path: Path) -> bool:
    """Whether a file holds JSON."""
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True
