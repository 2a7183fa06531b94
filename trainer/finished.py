"""Whether the run in a folder has finished, and what helps where it holds no model."""

from pathlib import Path

from data.paths import quoted
from trainer.checkpoint_files import committed

KINDS = {
    "shear.json": "shearing",
    "cpt.json": "continued pre-training",
    "finetune.json": "fine-tuning",
}
"""Reports of finished runs, and what such a run is."""
REPORTS = tuple(KINDS)
OTHER = "the run's command"


def report_of(run: Path) -> Path | None:
    """The report that marks the run in a folder as finished; None where there is none. One that
    was cut off before anything was in it counts for nothing."""
    paths = (run / name for name in REPORTS)
    return next((path for path in paths if path.is_file() and path.stat().st_size), None)


def without_model(run: Path) -> str:
    """What to say of the run in a folder whose model is asked for and is not there."""
    report = report_of(run)
    if report is None:
        return (
            "a run that has not finished, so it has no whole model yet; resume it with the command "
            f"that started it, the one with --output {quoted(run)}"
        )
    return (
        "a run that is finished, but its model/ is gone: name the folder where it is now, "
        f"{ways_back(report, OTHER)} for {OTHER}"
    )


def ways_back(report: Path, command: str) -> str:
    """How the finished run of `report`, which `command` made, has a model again that is gone."""
    again = ""
    if committed(report.parent / "checkpoints"):
        again = f"delete {report} to have {command} write it from the last checkpoint, "
    return f"put it back from a copy, {again}or name another --output"
