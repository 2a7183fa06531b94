import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from trainer.domains import Domains, parse_values, sheared_report, starting_domains

SIZES = {"c4": 30, "github": 10}
SHEARED = {
    "weights": {"c4": 0.2, "github": 0.8},
    "reference": {"c4": {"loss": 2.5, "tokens": 9}, "github": 1.5},
}


def start(**changes: Any) -> Domains:
    arguments: dict[str, Any] = {
        "weights": None,
        "reference": None,
        "sheared": None,
        "dynamic": True,
    }
    return starting_domains(SIZES, **(arguments | changes))


def test_proportional_and_fixed_by_default() -> None:
    domains = start()
    assert domains.weights == {"c4": 0.75, "github": 0.25}
    assert domains.reference == {}
    assert len(domains.notes) == 1 and "--reference-losses" in domains.notes[0]
    assert start(dynamic=False).notes == []


def test_the_shearing_run_comes_before_the_default() -> None:
    domains = start(sheared=SHEARED)
    assert domains == Domains({"c4": 0.2, "github": 0.8}, {"c4": 2.5, "github": 1.5}, [])


def test_options_come_first() -> None:
    domains = start(sheared=SHEARED, weights="github=3, c4=1", reference="c4=3,github=2")
    assert domains == Domains({"c4": 0.25, "github": 0.75}, {"c4": 3.0, "github": 2.0}, [])


def test_a_shearing_run_on_other_domains() -> None:
    sheared = {"weights": {"c4": 0.4, "book": 0.6}, "reference": {"c4": 2.5, "book": 1.0}}
    domains = start(sheared=sheared)
    assert domains.weights == {"c4": 0.75, "github": 0.25}
    assert domains.reference == {} and len(domains.notes) == 2


@pytest.mark.parametrize("text", ["c4", "c4=x", "=1", "c4=-1", "c4=nan", "c4=1,c4=2", ""])
def test_malformed_values_name_the_flag(text: str) -> None:
    with pytest.raises(InputError, match="--domain-weights"):
        parse_values(text, "--domain-weights")


@pytest.mark.parametrize("text", ["c4=1", "c4=1,github=1,book=1"])
def test_each_domain_exactly_once(text: str) -> None:
    with pytest.raises(InputError, match=r"\['c4', 'github'\]"):
        start(weights=text)


def test_weights_above_zero() -> None:
    with pytest.raises(InputError, match="sum to 0"):
        start(weights="c4=0,github=0")


def test_finds_the_report_beside_the_model(tmp_path: Path) -> None:
    assert sheared_report(tmp_path / "model") is None
    (tmp_path / "shear.json").write_text(json.dumps(SHEARED))
    assert sheared_report(tmp_path / "model") == SHEARED
