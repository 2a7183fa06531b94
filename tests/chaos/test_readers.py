"""Damaged files: InputError or the right result, never a traceback, a hang or a wrong value."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos import data_readers, run_readers
from tests.chaos.mutations import Reader, try_all
from tests.chaos.workspace import Workspace, quiet

MUTATIONS = 200
"""Of each file; `python -m tests.chaos` tries more."""

GROUPS: dict[str, Callable[[Workspace, Path, pytest.MonkeyPatch], list[Reader]]] = {
    "tokens": lambda chaos, root, patch: data_readers.token_readers(chaos),
    "job": lambda chaos, root, patch: data_readers.job_readers(chaos, root),
    "text": lambda chaos, root, patch: data_readers.text_readers(root),
    "checkpoint": lambda chaos, root, patch: run_readers.checkpoint_readers(chaos, root),
    "run": lambda chaos, root, patch: run_readers.run_readers(chaos),
    "kept": lambda chaos, root, patch: run_readers.kept_readers(chaos, root),
    "stages": lambda chaos, root, patch: run_readers.stage_readers(chaos, root),
    "user": run_readers.user_readers,
    "lock": lambda chaos, root, patch: run_readers.lock_readers(root),
}


@pytest.mark.parametrize("group", GROUPS)
def test_damaged_files_are_refused_or_read_right(
    group: str, chaos: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = []
    with quiet():
        for reader in GROUPS[group](chaos, tmp_path, monkeypatch):
            began = time.monotonic()
            outcome = try_all(reader, seed=0, most=MUTATIONS)
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.counts.items()))
            print(
                f"{reader.name}: {outcome.mutations} mutations in "
                f"{time.monotonic() - began:.1f} s: {counts}"
            )
            if outcome.failures:
                failures.append(f"{reader.name}:\n{outcome.describe()}")
    assert not failures, "\n\n".join(failures)
