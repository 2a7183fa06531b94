"""Runs that are killed, stopped, starved and damaged end as undisturbed ones do, bit for bit."""

import os
from pathlib import Path

import pytest

from tests.chaos.__main__ import SCENARIOS
from tests.chaos.campaign import Campaign, run_campaign
from tests.chaos.workspace import make_inputs

SEED = int(os.environ.get("CHAOS_SEED", "0"))
"""The plan of faults; a failure prints it."""


def disturbed(folder: Path, names: str, number: int) -> Campaign:
    workspace = make_inputs(folder / "inputs")
    return run_campaign(folder, workspace, names=names.split(","), number=number, seed=SEED)


def test_disturbed_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    campaign = disturbed(tmp_path, "shear 1,cpt 2,tokenize 2", 6)
    assert not campaign.problems, f"CHAOS_SEED={SEED}\n" + "\n\n".join(campaign.problems)
    assert campaign.counts.total() >= 6


@pytest.mark.slow
def test_runs_survive_sixty_faults(tmp_path: Path) -> None:
    campaign = disturbed(tmp_path, SCENARIOS, int(os.environ.get("CHAOS_FAULTS", "60")))
    assert not campaign.problems, f"CHAOS_SEED={SEED}\n" + "\n\n".join(campaign.problems)
    assert campaign.counts.total() >= 60
