"""Options of launch.report."""

from dataclasses import dataclass
from typing import Annotated

from data.errors import InputError
from data.options import ON_DISK, Positional


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write one HTML page about runs, finished or still running."""

    runs: Annotated[tuple[str, ...], Positional("RUN ..."), ON_DISK] = ("runs/shear",)
    """Output folders of `shorn shear` (shown first) and `shorn cpt`, several of each to compare
    them. Which started from which is told from their weights."""
    output: Annotated[str | None, ON_DISK] = None
    """File to write. Default: report.html in the folder of the run that is shown first."""
    figures: Annotated[str | None, ON_DISK] = None
    """Folder for the page's pictures as PNG files."""
    json: Annotated[str | None, ON_DISK] = None
    """File for the page's numbers as JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run named; give the output folder of one, such as runs/shear")
