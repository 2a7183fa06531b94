"""Runs that are disturbed until they finish all the same, and what must hold of them then.

The plan comes from a seed. After each fault the same command is repeated as a user would: where a
message names a remedy, that is followed, word by word.
"""

import fcntl
import hashlib
import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.chaos import faults
from tests.chaos.faults import Moment, Struck
from tests.chaos.processes import Command, Machine, Started, nobody_left, until
from tests.chaos.workspace import Workspace

STEPS = 18
SAVE_INTERVAL = 3
MOST_STARTS = 12
"""Of a run and its faults, before it counts as never finishing."""
SECONDS_TO_VANISH = 15.0
"""What processes may take that belong to a command that has ended."""
STOP_STATUSES = (0, 75, 128 + signal.SIGTERM, 128 + signal.SIGUSR1, 130)
LITTER = re.compile(r"\.partial$|\.tmp$|\.removed$|\.replaced$|^\.step-|^model\.unchecked$")
SIGNALS = {
    "SIGKILL": signal.SIGKILL,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
    "SIGUSR1": signal.SIGUSR1,
}
DAMAGES: dict[str, faults.Damage] = {
    "flip in checkpoint": faults.flip_in_checkpoint,
    "cut in checkpoint": faults.cut_in_checkpoint,
    "emptied in checkpoint": faults.empty_in_checkpoint,
    "removed in checkpoint": faults.remove_in_checkpoint,
    "renamed checkpoint": faults.rename_checkpoint,
    "lost checkpoints": faults.remove_checkpoints,
    "half a checkpoint": faults.leave_partial_checkpoint,
    "damaged record": faults.damage_record,
}
TRAINING = (
    *("SIGKILL", "SIGKILL", "SIGKILL of one", "SIGTERM", "SIGTERM of one", "SIGINT", "SIGUSR1"),
    *("full disk", "file limit", "double start", "foreign checkpoint", "damaged record"),
    *DAMAGES,
)
LAUNCHED = ("SIGKILL of the launcher", "SIGKILL of a launched rank", "SIGTERM of the launcher")
TOKENIZING = (
    *("SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGKILL of a worker", "full disk", "file limit"),
    *("double start", "damaged record", "damaged record", "damaged shard", "half a shard"),
)
RUNNING = (
    *(*SIGNALS, "SIGKILL of one", "SIGTERM of one", "SIGKILL of a worker", *LAUNCHED),
    *("full disk", "file limit", "double start"),
)
"""Faults that strike a running command; the others damage what it left."""


class Fault(AssertionError):
    """Something did not hold; the message tells how to repeat it."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, what an undisturbed run of it comes to, and which faults it meets."""

    name: str
    command: Callable[..., Command]
    """The command for an output folder, and another seed."""
    result: str
    """Hash of what it makes."""
    kinds: tuple[str, ...]


@dataclass(slots=True)
class Campaign:
    """Disturbs runs on `machine`; counts and complains."""

    machine: Machine
    workspace: Workspace
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    """Faults that struck, by kind."""
    missed: int = 0
    """Faults whose moment did not come."""
    starts: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    """What did not hold, in the order in which it happened."""
    history: list[str] = field(default_factory=list)
    """What happened to the current run."""

    def scenario(self, name: str) -> Scenario:
        """Runs a command undisturbed and says how it is disturbed. `name`: "shear 2" on two
        ranks, "tokenize 2" on two workers."""
        command, _, number = name.partition(" ")
        ranks = int(number)

        def make(output: Path, seed: int = 0) -> Command:
            if command == "tokenize":
                words = self.workspace.tokenize_words(output)
                words += ["--workers", number]
                return Command(name=command, words=words, output=output)
            words_of = getattr(self.workspace, f"{command}_words")
            words = [*words_of(output, STEPS, SAVE_INTERVAL), "--seed", str(seed)]
            return Command(name=command, words=words, output=output, ranks=ranks)

        kinds = TOKENIZING if command == "tokenize" else TRAINING
        if command == "tokenize" and ranks == 1:
            kinds = tuple(kind for kind in kinds if kind != "SIGKILL of a worker")
        folder = self.workspace.root / "undisturbed" / name.replace(" ", "-")
        self._finish_undisturbed(make(folder))
        if command != "tokenize" and ranks > 1:
            kinds = (*kinds, *LAUNCHED)
        return Scenario(name, make, result_of(folder), kinds)

    def _foreign(self, scenario: Scenario) -> Path:
        """The output of an unfinished run of another seed."""
        name = f"{scenario.name.replace(' ', '-')}-foreign"
        folder = self.workspace.root / "undisturbed" / name
        if not folder.exists():
            started = self.machine.start(scenario.command(folder, seed=1))
            with nobody_left(started):
                until(lambda: faults.newest_checkpoint(folder) is not None, 60.0)
                started.send(signal.SIGKILL)
                started.wait()
        return folder

    def _finish_undisturbed(self, command: Command) -> None:
        started = self.machine.start(command)
        with nobody_left(started):
            status = started.wait()
        if status != 0 or not is_finished(command):
            raise Fault(f"undisturbed {command.name} ended with {status}:\n{started.text}")

    def disturb(self, scenario: Scenario, kinds: list[str]) -> None:
        """One run of `scenario` that meets faults of these kinds, in order, until it finishes."""
        output = self.workspace.root / "disturbed" / scenario.name.replace(" ", "-")
        shutil.rmtree(output, ignore_errors=True)
        command = scenario.command(output)
        self.history = [f"{scenario.name}:"]
        backup: dict[Path, bytes] = {}
        waiting = list(kinds)
        tried: set[str] = set()
        for _ in range(MOST_STARTS + 2 * len(kinds)):
            kind = waiting.pop(0) if waiting else None
            if kind is not None:
                struck = self._damage(scenario, kind, output)
                if struck is not None:
                    backup.update(struck.backup)
                    kind = None
                elif kind not in RUNNING and kind not in tried:
                    # Nothing to damage yet: the run is killed on its way, and damaged then.
                    tried.add(kind)
                    waiting.insert(0, kind)
            started, met = self._run(command, kind)
            self._look_at(started, met)
            refused = _error(started)
            if refused is not None and not met:
                self._follow(refused, output, backup)
            elif kind is None and not waiting and is_finished(command) and refused is None:
                break
            # Most faults need an unfinished run; half of the rest meets the finished one.
            if is_finished(command) and waiting and kind is not None and self.rng.random() < 0.5:
                if met:
                    self._run(command, None)
                self._check(scenario, output)
                shutil.rmtree(output)
        else:
            self._complain("never finishes")
        self._check(scenario, output)

    def _damage(self, scenario: Scenario, kind: str, output: Path) -> Struck | None:
        damages = dict(DAMAGES)
        damages["damaged shard"] = faults.damage_shard
        damages["half a shard"] = faults.leave_temporary_shard
        if kind == "foreign checkpoint":
            damages[kind] = faults.put_foreign_checkpoint(self._foreign(scenario))
        if kind not in damages:
            return None
        struck = damages[kind](output, self.rng) if output.is_dir() else None
        if struck is not None:
            self._count(kind, struck.text)
        if struck is not None and kind == "damaged shard" and (output / "manifest.json").is_file():
            self._read_damaged(scenario, output, struck)
        return struck

    def _read_damaged(self, scenario: Scenario, output: Path, struck: Struck) -> None:
        """Whoever reads a finished folder whose shard is damaged learns it, and what helps."""
        message = faults.reading_problem(output)
        self.history.append(f"    read: {message}")
        if message is None:
            self._complain("a damaged shard is read without a word")
        elif "--overwrite" in message:
            command = scenario.command(output)
            words = [*command.words, "--overwrite"]
            started = self.machine.start(replace(command, words=words))
            with nobody_left(started):
                self.history.append(f"    --overwrite ended with {started.wait()}")
        else:
            self._complain("no remedy for a damaged shard")
        for path, content in struck.backup.items():
            path.write_bytes(content)

    def _run(self, command: Command, kind: str | None) -> tuple[Started, bool]:
        """Runs a command that meets a fault, or none; whether the fault struck."""
        self.starts += 1
        disk = largest = None
        if kind == "full disk" and self.machine.library is not None:
            disk = self.rng.choice((0, self.rng.randrange(5_000), self.rng.randrange(1_500_000)))
        elif kind in ("full disk", "file limit"):
            largest = self.rng.randrange(600_000)
        cold = kind is not None and "launche" in kind
        if kind is None:
            self.history.append("  the same command again")
        started = self.machine.start(command, cold=cold, disk=disk, largest_file=largest)
        with nobody_left(started):
            met = False
            if disk is not None or largest is not None:
                self._count(str(kind), f"{disk if largest is None else largest:,} bytes")
                met = True
            elif kind is not None:
                met = self._strike(started, kind)
            status = started.wait()
            if not until(lambda: not started.descendants(), SECONDS_TO_VANISH):
                self._complain(f"processes stay behind: {started.descendants()}")
        self.history.append(f"    ended with {status}: {_last_line(started)}")
        if not met and status not in (0, 2):
            self._complain(f"status {status} without a fault:\n{started.text[-2000:]}")
        return started, met

    def _strike(self, started: Started, kind: str) -> bool:
        moment = faults.moments(self.rng, started.command, STEPS)
        if kind not in RUNNING:
            kind, step = "SIGKILL", self.rng.randrange(SAVE_INTERVAL + 1, STEPS)
            moment = Moment("task 1" if started.command.name == "tokenize" else f"step {step}", 0.0)
        if not moment.wait(started):
            self.missed += 1
            return False
        where = f"at {moment.name} + {moment.delay:.3f} s"
        if kind == "double start":
            wrong = faults.start_twice(self.machine, started)
            self._count(kind, where)
            if wrong:
                self._complain(wrong)
            return True
        if kind == "SIGKILL of a worker":
            struck = faults.kill_worker(started, self.rng)
        elif kind == "SIGKILL of a launched rank":
            struck = faults.kill_launched_rank(started, self.rng)
        else:
            pids = [self.rng.choice(started.pids)] if kind.endswith("of one") else None
            started.send(SIGNALS[kind.split()[0]], pids)
            struck = True
        if struck:
            self._count(kind, where)
        return struck

    def _count(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.history.append(f"  {kind}: {text}")

    def _complain(self, text: str) -> None:
        self.problems.append("\n".join([*self.history, f"  !! {text}"]))

    def _look_at(self, started: Started, met: bool) -> None:
        """What may never be printed."""
        # A signal may come while the process that stands in for a cold start wraps up.
        text = re.sub(
            r"Process ForkServerProcess-\d+:\n(?s:.*)\nKeyboardInterrupt\n", "", started.text
        )
        if "Traceback (most recent call last)" in text:
            self._complain(f"a traceback:\n{text[-3000:]}")
        first = started.logs[0].read_text(errors="replace").splitlines()
        errors = [line for line in first if line.startswith("error")]
        if len(errors) > 1 and not met:
            self._complain("several errors:\n" + "\n".join(errors))

    def _follow(self, message: str, output: Path, backup: dict[Path, bytes]) -> None:
        """Does what an error message says helps."""
        self.refusals[_kind_of(message, output)] += 1
        self.history.append(f"    refused: {message}")
        done = follow(message, output, backup)
        if done is None:
            self._complain(f"no remedy that helps: {message}")
            shutil.rmtree(output, ignore_errors=True)
        else:
            self.history.append(f"    remedy: {done}")

    def _check(self, scenario: Scenario, output: Path) -> None:
        """What must hold of a finished run."""
        command = scenario.command(output)
        wrong = []
        if result_of(output) != scenario.result:
            wrong.append("another result than the undisturbed run's")
        if command.name != "tokenize":
            steps = _steps(output / "metrics.jsonl")
            whole = list(range(1, STEPS + 1))
            if "damaged record: metrics.jsonl" in "".join(self.history):
                # What is lost stays lost, and nobody writes the file of a finished run anew.
                steps = [step for step in steps if isinstance(step, int)]
                whole = [step for step in whole if step in steps]
            if steps != whole:
                wrong.append(f"metrics.jsonl holds the steps {steps}")
            report = output / f"{command.name}.json"
            if not faults.is_json(report):
                wrong.append(f"{report.name} is no report")
        litter = [str(p.relative_to(output)) for p in output.rglob("*") if LITTER.search(p.name)]
        if litter:
            wrong.append(f"left behind: {', '.join(litter)}")
        held = [str(path) for path in output.rglob("*lock") if path.is_file() and _is_held(path)]
        if held:
            wrong.append(f"still locked: {held}")
        for text in wrong:
            self._complain(text)

    def summary(self) -> str:
        """One line for people and logs."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return (
            f"{self.counts.total()} faults in {self.starts} starts ({self.missed} came too late), "
            f"{self.refusals.total()} refusals, {len(self.problems)} problems: {kinds}"
        )


def is_finished(command: Command) -> bool:
    """Whether a command has made what it is for."""
    name = "manifest.json" if command.name == "tokenize" else f"{command.name}.json"
    return (command.output / name).is_file()


def result_of(output: Path) -> str:
    """A hash of weights and masks, or of shards; "" where there are none."""
    patterns = (
        *("model/*.safetensors", "adapter/*.safetensors", "masks.safetensors"),
        *("train/**/*.*", "held_out/**/*.*"),
    )
    digest = hashlib.sha256()
    files = sorted(path for pattern in patterns for path in output.glob(pattern))
    for path in files:
        digest.update(str(path.relative_to(output)).encode() + path.read_bytes())
    manifest = output / "manifest.json"
    if faults.is_json(manifest):
        splits: Any = json.loads(manifest.read_bytes()).get("splits")
        digest.update(json.dumps(splits, sort_keys=True).encode())
        files.append(manifest)
    return digest.hexdigest()[:16] if files else ""


def follow(message: str, output: Path, backup: dict[Path, bytes]) -> str | None:
    """Does what `message` says helps; what that was, or None where it names nothing.

    A copy is put back where the message asks for one and there was one. Paths are deleted or moved
    away where the message names them after that word.
    """
    places = [Path(text.rstrip(".,;:)")) for text in re.findall(r"/[^\s,;()]+", message)]
    inside = [place for place in places if place.is_relative_to(output) and place != output]
    if re.search(r"restore|put back|copy it", message):
        put = [path for path in backup if path in inside or path.parent in inside]
        for path in put:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(backup.pop(path))
        if put:
            return f"restored {', '.join(path.name for path in put)}"
    renamed = re.search(r"call it (\S+) again", message)
    if renamed and inside:
        inside[0].rename(inside[0].with_name(renamed[1]))
        return f"renamed to {renamed[1]}"
    named = re.search(r"(?:delete|remove)(?: the (?:folder|file))? (/.*)", message)
    words = re.findall(r"/[^\s,;()]+", named[1]) if named else []
    doomed = [place for place in inside if any(word.startswith(str(place)) for word in words)]
    if not doomed and re.search(r"delete (?:the file|the folder|it)|move it", message):
        doomed = inside[:1]
    deleted = [place for place in doomed if _delete(place)]
    for place in deleted:
        for path in [path for path in backup if path.is_relative_to(place)]:
            del backup[path]
    if deleted:
        return f"deleted {', '.join(str(place.relative_to(output)) for place in deleted)}"
    if "--overwrite" in message or "tokenize it again" in message or "tokenize again" in message:
        shutil.rmtree(output)
        return "tokenized again into an empty folder"
    if re.search(r"same command again|run it again", message):
        return "the same command again"
    if re.search(r"another --output|another folder|new folder", message):
        shutil.rmtree(output)
        return "another output"
    return None


def _delete(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path)
        return True
    if path.exists():
        path.unlink()
        return True
    return False


def _error(started: Started) -> str | None:
    lines = started.text.splitlines()
    for index, line in enumerate(lines):
        if line.startswith("error"):
            return "\n".join(lines[index:]).partition(": ")[2]
    return None


def _kind_of(message: str, output: Path) -> str:
    return re.sub(r"[0-9a-f]{6,}|\d+", "N", message.replace(str(output), "OUTPUT"))[:80]


def _last_line(started: Started) -> str:
    lines = [line for line in started.text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _steps(path: Path) -> list[Any]:
    if not path.exists():
        return []
    steps: list[Any] = []
    for line in path.read_bytes().splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError) as error:
            steps.append(f"{type(error).__name__}: {error}")
    return steps


def _is_held(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def plan(rng: random.Random, scenarios: list[Scenario], number: int) -> list[tuple[int, list[str]]]:
    """`number` faults over runs of the scenarios: each kind as often as any other, two to five to a
    run."""
    decks: list[list[str]] = [[] for _ in scenarios]
    rounds: list[tuple[int, list[str]]] = []
    left, turn = number, 0
    while left > 0:
        index = turn % len(scenarios)
        turn += 1
        size = min(left, rng.randrange(2, 6))
        while len(decks[index]) < size:
            kinds = list(scenarios[index].kinds)
            rng.shuffle(kinds)
            decks[index] += kinds
        rounds.append((index, decks[index][:size]))
        del decks[index][:size]
        left -= size
    return rounds


def run_campaign(
    folder: Path,
    workspace: Workspace,
    *,
    names: list[str],
    number: int,
    seed: int,
    show: Callable[[str], None] = print,
) -> Campaign:
    """Disturbs runs of the named scenarios with at least `number` faults; prints as it goes."""
    rng = random.Random(seed)
    began = time.monotonic()
    campaign = Campaign(Machine(folder), workspace, rng)
    scenarios = [campaign.scenario(name) for name in names]
    show(f"chaos: seed {seed}, undisturbed results " + str({s.name: s.result for s in scenarios}))
    while campaign.counts.total() < number:
        for index, kinds in plan(rng, scenarios, number - campaign.counts.total()):
            known = len(campaign.problems)
            campaign.disturb(scenarios[index], kinds)
            show("\n".join(campaign.history))
            for problem in campaign.problems[known:]:
                show("PROBLEM\n" + problem)
    show(f"chaos: {campaign.summary()}; seed {seed}, {time.monotonic() - began:.0f} s")
    digest = hashlib.sha256("".join(scenario.result for scenario in scenarios).encode())
    show(f"chaos: final hash {digest.hexdigest()[:16]} of all results")
    return campaign
