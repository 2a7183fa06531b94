"""One HTML page about a shearing run, a run of continued pre-training, or one after the other.

Needs the extra `demo` (matplotlib). The page loads nothing from a network.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tyro.conf import Positional, arg

from data import cli
from data.errors import InputError

EXAMPLES = """
python -m launch.report runs/shear
python -m launch.report runs/shear runs/cpt --output report.html --json report.json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write an HTML page about runs, which may still be going on."""

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="[RUN ...]")] = ("runs/shear",)
    """Output folders of pruner.shear and launch/cpt.py, in the order in which they trained; at most
    one of pruner.shear, which is shown first wherever it is named."""
    output: str | None = None
    """File to write. None: report.html in the folder of the run that is shown first."""
    json: str | None = None
    """File for the page's numbers as JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run named; give the output folder of one, such as runs/shear")


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ReportConfig, section="report", argv=argv, examples=EXAMPLES)
    from launch.report_page import run

    run(config)


if __name__ == "__main__":
    cli.run(main)
