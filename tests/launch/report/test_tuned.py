"""The page of fine-tuning, alone and behind the runs that it goes on from."""

import json
from pathlib import Path

import pytest

from launch.report.lineage import lines_of
from launch.report.run_folder import read_run
from launch.report.verdicts import verdict_sections
from tests.launch.report.test_report import TRAINING, check_self_contained, make, runs
from tests.trainer.tiny import options
from trainer.finetune import finetune
from trainer.finetune_config import FinetuneConfig
from trainer.verdict import stages_of

__all__ = ["runs"]


@pytest.fixture(scope="module")
def tuned(runs: Path) -> Path:
    """A finished run of fine-tuning that followed "cpt"."""
    output = runs / "tuned"
    train = options(steps=3, seq_len=32, eval_interval=1)
    config = FinetuneConfig(
        model=str(runs / "cpt"),
        data=str(runs / "tokens"),
        output=str(output),
        method="last-blocks",
        last_blocks=1,
        train=train,
    )
    assert finetune(config, tensorboard=False) is not None
    return output


def test_the_page_of_fine_tuning(runs: Path, tuned: Path, tmp_path: Path) -> None:
    page, numbers = make(tmp_path, tuned)
    check_self_contained(page)
    assert tuple(page.headings) == ("Verdict", *TRAINING)
    assert "Fine-tuning: tuned" in page.text and "3 of 3" in page.text
    trained = json.loads((tuned / "finetune.json").read_text())["trained_parameters"]
    assert f"trained{trained:,}parameters" in page.text.replace(" ", "")
    assert (numbers["runs"][0]["command"], numbers["runs"][0]["finished"]) == ("finetune", True)


def test_a_chain_of_three_runs_is_one_line(runs: Path, tuned: Path, tmp_path: Path) -> None:
    names = ["source", "sheared", "trained", "fine-tuned"]
    assert [stage.name for stage in stages_of(tuned)] == names
    page, _ = make(tmp_path, runs / "shear", tuned, runs / "cpt")
    check_self_contained(page)
    (line,) = lines_of([read_run(folder) for folder in (runs / "shear", tuned, runs / "cpt")])
    assert [run.command for run in line.runs] == ["shear", "cpt", "finetune"]
    assert "(trained → now)" in page.text


def test_a_run_that_is_not_finished_is_judged_so_far(
    runs: Path, tuned: Path, tmp_path: Path
) -> None:
    report = tuned / "finetune.json"
    aside = report.rename(tmp_path / "aside.json")
    try:
        (section,) = verdict_sections(lines_of([read_run(runs / "cpt"), read_run(tuned)]))
        assert "so far, at step 3 of 3" in section and "now" in section
    finally:
        aside.rename(report)
