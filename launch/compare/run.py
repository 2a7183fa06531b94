"""A comparison from its options to the table."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import require_writable, write_copy
from data.find import find_files
from data.hub import pinned
from data.locks import folder_lock
from data.pipes import INTO_A_FILE, is_pipe
from launch.compare.config import CompareConfig
from launch.compare.dead_units import dead_units_plan
from launch.compare.losses import losses_plan
from launch.compare.stages import StageMaker
from launch.evaluate.config import EvaluateConfig
from launch.evaluate.tasks import Tasks
from launch.evaluate.texts import read_named
from launch.origin import first_names, model_fingerprint
from launch.stages import Stages, Task, require_own, run_tasks
from pruner.shapes import require_even
from trainer.inputs import require_positions
from trainer.models.hf import load_config
from trainer.models.sources import resolve_model

SAMPLE = 2**20
"""Bytes at the beginning and at the end of a text by which it is known."""


def run(config: CompareConfig) -> dict[str, Any] | None:
    """Runs the stages that are not finished, prints the table and returns what --json writes.

    An interrupted comparison prints the rows it has. Raises InputError before anything runs for
    options that cannot work with the source or the input, and where another process compares
    into the same output; at the end for stages that failed.
    """
    folder = resolve_model(config.source, weights=False, option="--source")
    source, revision = load_config(folder), pinned(config.source, folder)
    require_even(source, config.source)
    require_positions(config.seq_len, source)
    require_writable(config.json, "--json")
    require_own(Path(config.output))
    if config.text is not None:
        _check_text(config.text)
    of_tasks: dict[str, Any] = {}
    if config.tasks:
        # Missing data would end the comparison after hours of training.
        tasks = Tasks(EvaluateConfig(tasks=config.tasks, task_files=config.task_files))
        tasks.load()
        of_tasks = {one.name: tasks.harness.identity(one.name) for one in tasks.asked}
    files = find_files(config.input, Path(config.output))
    maker = StageMaker(config, of_tasks)
    plan = dead_units_plan(maker, source) if config.dead_units else losses_plan(maker, source)
    done: set[str] = set()
    results: dict[str, Any] | None = None

    def finished(task: Task) -> None:
        nonlocal results
        done.add(task.name)
        # A finished run needs none, and they are the largest thing it leaves.
        shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
        results = plan.results(done)
        if results is not None:
            write_copy(config.json, results)

    names = {"--source": config.source, "--input": list(config.input)}
    contents = {"--source": model_fingerprint(config.source), "--input": _text_fingerprint(files)}
    with folder_lock(maker.output, "comparing"):
        revisions = {} if revision is None else {"--source": revision}
        first = first_names(maker.output, names, contents, revisions)
        renamed = [(names[option], first[option]) for option in names]
        stages = Stages(maker.output, number=len(plan.tasks), renamed=renamed)
        try:
            run_tasks(
                plan.tasks, stages, jobs=config.jobs, running=maker.running, finished=finished
            )
        finally:
            if results is not None:
                plan.show(results)
    return results


def _check_text(name: str) -> None:
    """Raises InputError for a --text that the stages could not score."""
    if is_pipe(Path(name)):
        raise InputError(
            f"--text {name}: is a pipe, and the evaluation of every model would have to read it; "
            f"{INTO_A_FILE}"
        )
    read_named(name)


def _text_fingerprint(files: Sequence[Path]) -> str:
    """Hash of the names and sizes of files, in which the folder they lie in does not count; behind
    a colon that of their beginnings and ends, so that a large text is not read whole."""
    content = sorted((path.name, path.stat().st_size) for path in files)
    samples = sorted((path.name, _samples(path)) for path in files)
    first, second = (
        hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16] for own in (content, samples)
    )
    return f"{first}:{second}"


def _samples(path: Path) -> str:
    with path.open("rb") as file:
        begins = file.read(SAMPLE)
        file.seek(max(0, path.stat().st_size - SAMPLE))
        return hashlib.sha256(begins + file.read()).hexdigest()
