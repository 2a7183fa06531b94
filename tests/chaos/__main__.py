"""`python -m tests.chaos --faults 60 --seed 1`: disturbs runs, and says what did not hold."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import run_campaign
from tests.chaos.workspace import make_inputs

SCENARIOS = "shear 1,cpt 2,tokenize 2,shear 2,cpt 1,finetune 1,tokenize 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", default=SCENARIOS, help="commands and ranks (or workers)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        workspace = make_inputs(Path(name) / "inputs")
        campaign = run_campaign(
            Path(name),
            workspace,
            names=given.scenarios.split(","),
            number=given.faults,
            seed=given.seed,
        )
    sys.exit(bool(campaign.problems))


if __name__ == "__main__":
    main()
