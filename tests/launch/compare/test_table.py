"""The table of a comparison: who leads, and what is printed."""

import math
from pathlib import Path
from typing import Any

import pytest

from data.files import finite_only
from launch.compare.table import _spread, leads, print_results


def lead_rows(method: str, losses: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"target": "half", "method": method, "seed": seed, "trained": {"all": loss}}
        for seed, loss in losses.items()
    ]


def test_leads_compare_the_seeds_that_both_have() -> None:
    ours = lead_rows("ours", {0: 2.0, 1: 3.0, 2: 1.0})
    (lead,) = leads(ours + lead_rows("paper", {1: 2.5, 2: 2.0, 7: 0.5}))
    assert lead["seeds"] == [1, 2] and lead["lower_by"] == 0.25 and lead["beyond_spread"] is False
    (lead,) = leads(ours + lead_rows("paper", {0: 4.0, 1: 3.5}))
    assert lead["lower_by"] == 1.25 and lead["beyond_spread"] is True
    (lead,) = leads(ours + lead_rows("paper", {0: 1.0, 1: 1.5}))
    assert lead["lower_by"] == -1.25 and lead["beyond_spread"] is True
    (lead,) = leads(ours + lead_rows("paper", {0: 1.5}) + lead_rows("random", {0: 9.0, 1: 9.0}))
    assert lead["best_other"] == "paper" and lead["lower_by"] == -0.5
    assert lead["beyond_spread"] is None
    assert leads(ours + lead_rows("paper", {8: 1.0})) == []


def test_leads_are_printed_with_their_side(capsys: pytest.CaptureFixture[str]) -> None:
    lead = {"target": "half", "domain": "all", "best_other": "paper"}
    spread = {"all": {"mean": 1.0, "min": 1.0, "max": 1.0}}
    entry = {"target": "half", "method": "ours", "non_embedding_parameters": 1}
    results = {
        "source_held_out": {"all": 1.0},
        "source_non_embedding_parameters": 1,
        "targets": {"half": "layers=1"},
        "summary": [entry | {"kept_not_alive": [], "pruned": {}, "trained": spread}],
        "leads": [
            lead | {"lower_by": -0.066, "beyond_spread": None},
            lead | {"lower_by": -0.5, "beyond_spread": True},
        ],
        "missing_rows": 0,
    }
    print_results(results)
    printed = capsys.readouterr().out
    assert "all: ours is 0.066 above the best other, paper, one seed: no spread" in printed
    assert "0.500 above the best other, paper, more than the spread over seeds" in printed


def test_leads_need_ours_and_another() -> None:
    ours = lead_rows("ours", {0: 1.0})
    assert leads(ours) == [] and leads(lead_rows("paper", {0: 1.0})) == []
    assert leads(ours + lead_rows("taylor", {0: 1.0})) == []
    elsewhere = [row | {"target": "quarter"} for row in lead_rows("paper", {0: 1.0})]
    assert leads(ours + elsewhere) == []


def test_nothing_is_printed_of_a_target_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(
        {
            "source_held_out": {"all": 1.0},
            "source_non_embedding_parameters": 1,
            "targets": {"half": "layers=1"},
            "summary": [],
            "leads": [],
            "missing_rows": 0,
        }
    )
    assert capsys.readouterr().out == ""


def test_an_infinite_perplexity_is_shown_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It neither leaves its column to another number, nor its seed out."""
    spread = {"mean": 2.0, "min": 2.0, "max": 2.0}
    accuracy = {"metric": "acc", "mean": 0.25, "min": 0.25, "max": 0.25, "stderr": 0.01}
    entry = {
        "target": "half",
        "method": "ours",
        "seeds": [0, 1],
        "non_embedding_parameters": 10**6,
        "kept_not_alive": [],
        "pruned": {},
        "trained": {"all": spread},
        "text": _spread([20.0, math.inf]),
        "tasks": {"sciq": accuracy},
    }
    results: dict[str, Any] = {
        "source_held_out": {"all": 1.0},
        "source_text": math.inf,
        "source_tasks": {"sciq": {"metric": "acc", "value": 0.5, "stderr": 0.01}},
        "source_non_embedding_parameters": 10**6,
        "targets": {"half": "layers=1"},
        "summary": [entry],
        "leads": [],
        "missing_rows": 0,
    }
    print_results(results)
    lines = capsys.readouterr().out.splitlines()
    (source,) = [line for line in lines if "source" in line]
    (ours,) = [line for line in lines if "ours" in line]
    assert [cell.strip() for cell in source.split("│")[-3:-1]] == ["inf", "0.500 ±0.010"]
    assert [cell.strip()[:5] for cell in ours.split("│")[-3:-1]] == ["inf (", "0.250"]
    assert finite_only(results)["source_text"] is None


def test_who_prunes_elsewhere_is_another_and_a_variant_is_none() -> None:
    ours = lead_rows("ours", {0: 2.0})
    theirs = [row | {"folder": "theirs"} for row in lead_rows("theirs", {0: 1.5})]
    (lead,) = leads(ours + lead_rows("paper", {0: 3.0}) + theirs + lead_rows("varied", {0: 1.0}))
    assert lead["best_other"] == "theirs" and lead["lower_by"] == -0.5
