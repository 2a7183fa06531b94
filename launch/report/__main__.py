"""One HTML page about a shearing run, a run of continued pre-training, or one after the other.

Needs the extra `demo` (matplotlib). The page loads nothing from a network.
"""

from data import cli
from launch.report.config import ReportConfig

EXAMPLES = """
python -m launch.report runs/shear
python -m launch.report runs/shear runs/cpt --output report.html
python -m launch.report runs/shear runs/cpt --figures pictures
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ReportConfig, section="report", argv=argv, examples=EXAMPLES)
    from launch.report.page import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
