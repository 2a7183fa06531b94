"""Options of launch.report."""

from dataclasses import dataclass
from typing import Annotated

from data.errors import InputError
from data.options import Positional


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write an HTML page about runs, which may still be going on."""

    runs: Annotated[tuple[str, ...], Positional("RUN ...")] = ("runs/shear",)
    """Output folders of pruner.shear and launch/cpt.py, in the order in which they trained; at most
    one of pruner.shear, which is shown first wherever it is named."""
    output: str | None = None
    """File to write. None: report.html in the folder of the run that is shown first."""
    figures: str | None = None
    """Folder for the page's pictures as PNG files."""
    json: str | None = None
    """File for the page's numbers as JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run named; give the output folder of one, such as runs/shear")
