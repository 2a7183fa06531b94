"""Pages of runs whose blocks differ, and of runs with losses that are no numbers."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data.files import write_json
from pruner.shorten.run import shorten
from tests.factories import write_model, write_tokens
from tests.launch.report.test_report import check_self_contained, make
from tests.pruner.shorten.test_run import configure as shortening
from tests.trainer.tiny import options, pretrain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model, tokens, and a run of training, "cpt"."""
    root = tmp_path_factory.mktemp("runs")
    model = write_model(root / "model", num_hidden_layers=3)
    write_tokens(root / "tokens", model, number=40)
    settings = options(steps=3, seq_len=32, eval_interval=2)
    pretrain(settings, model=model, data=root / "tokens", output=root / "cpt")
    return root


def test_layers_that_were_removed_apart(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "apart"
    settings = shortening(runs, folder, units="both", remove=2, then="ffn=24", criterion="reverse")
    shorten(replace(settings, protect_first=0, protect_last=0))
    page, numbers = make(tmp_path, folder)
    check_self_contained(page)
    shown = numbers["runs"][0]
    # The last block has lost both, and with it the layers of its kinds.
    assert shown["target"]["layers"] == 2 and "mlp_layers" not in shown["target"]
    settings = shortening(runs, tmp_path / "ffn", units="feed-forward", remove=1, then="ffn=24")
    shorten(replace(settings, protect_first=0, protect_last=0, criterion="reverse"))
    page, numbers = make(tmp_path, tmp_path / "ffn")
    assert numbers["runs"][0]["target"]["mlp_layers"] == 2
    table = page.text.partition("Units on in every layer")[2]
    assert "MLP layers" in page.text
    rows = table.partition("per layer")[2]
    assert rows.index("removed") > rows.rindex("24 / 24") and rows.count("24 / 24") == 2


def test_losses_that_are_not_finite_are_left_out(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cpt"
    shutil.copytree(runs / "cpt", folder)
    report = json.loads((folder / "cpt.json").read_text())
    domain = next(iter(report["held_out"]))
    report["held_out"][domain] |= {"loss": math.nan, "perplexity": math.nan}
    write_json(folder / "cpt.json", report)
    assert "NaN" not in (folder / "cpt.json").read_text()
    page, numbers = make(tmp_path, folder)
    check_self_contained(page)
    assert domain not in numbers["runs"][0]["held_out"]
