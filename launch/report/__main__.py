"""One HTML page about runs of shearing and of continued pre-training, and how they compare.

Needs the extra `demo` (matplotlib). The page loads nothing from a network.
"""

from data import cli
from launch.report.config import ReportConfig

EXAMPLES = """
python -m launch.report runs/shear
python -m launch.report runs/shear runs/cpt --output report.html
python -m launch.report runs/shear runs/cpt --figures pictures
python -m launch.report runs/shear-a runs/shear-b
"""


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ReportConfig, section="report", argv=argv, examples=EXAMPLES)
    from launch.report.page import run

    run(config)


if __name__ == "__main__":
    cli.run(main, alone=True)
