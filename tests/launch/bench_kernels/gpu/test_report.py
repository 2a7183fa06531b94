"""Rates, table and CSV from recorded numbers."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.bench_kernels.gpu.benchmarks import MODELS
from launch.bench_kernels.gpu.report import ceiling_of, lines, print_report, write_csv

H100 = "NVIDIA H100 80GB HBM3"
FACTS = {"gpu": H100, "power cap": "700.00 W", "torch": "2.13.0", "commit": "abc1234"}


def timing(operator: str, side: str, **found: Any) -> dict[str, Any]:
    model = asdict(MODELS[0])
    common = {"operator": operator, "side": side, "model": model}
    return {**common, "status": "ok", "message": "", **found}


def passes(seconds: float, work: int, unit: str = "bytes") -> dict[str, Any]:
    entry = {"pass": "forward", "seconds": seconds, "work": work, "repeats": 9}
    return {"passes": [entry], "unit": unit}


RECORDED = [
    timing("copy", "eager", **passes(1e-4, 2 * 10**8)),
    timing("swiglu", "eager", **passes(4e-4, 3 * 10**8)),
    timing("swiglu", "triton", **passes(2e-4, 3 * 10**8)),
    timing("swiglu", "liger", status="not comparable", message="ModuleNotFoundError: no liger"),
    timing("rope", "triton", status="failed", message="RuntimeError: [3] of 33"),
    timing("loss", "eager", **passes(1e-3, 5 * 10**11, "operations")),
]


def test_rates_and_ratios() -> None:
    copy, eager, ours, liger, _, loss = lines(RECORDED, H100)
    assert (copy["rate"], copy["unit"], copy["of_copy"]) == (pytest.approx(2000), "GB/s", 1)
    assert copy["of_ceiling"] == pytest.approx(2000 / 3015)
    assert ours["microseconds"] == pytest.approx(200) and ours["rate"] == pytest.approx(1500)
    assert ours["of_copy"] == pytest.approx(0.75)
    assert (eager["eager_over_it"], ours["eager_over_it"]) == (1, pytest.approx(2))
    assert liger["status"] == "not comparable" and liger["rate"] is None
    assert (loss["rate"], loss["unit"]) == (pytest.approx(500), "TFLOP/s")
    assert loss["of_copy"] is None and loss["of_ceiling"] == pytest.approx(500 / 791.2)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [(H100, "H100 SXM"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"), ("NVIDIA B200", "B200")],
)
def test_ceilings_are_those_of_the_card(gpu: str, name: str) -> None:
    found = ceiling_of(gpu)
    assert found is not None and found.name == name


def test_an_unknown_card_has_no_ceiling() -> None:
    for name in (
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-PCIE-40GB",
    ):
        assert ceiling_of(name) is None, name
    assert lines(RECORDED, "NVIDIA H200")[2]["of_ceiling"] is None


def test_csv_says_what_it_was_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gpu.csv"
    write_csv(path, FACTS, lines(RECORDED, H100))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(RECORDED)
    assert all(row["gpu"] == H100 and row["power cap"] == "700.00 W" for row in rows)
    assert float(rows[2]["microseconds"]) == pytest.approx(200)
    assert rows[3]["microseconds"] == "" and rows[3]["message"].endswith("no liger")


def test_the_report_names_what_went_wrong() -> None:
    output = io.StringIO()
    print_report(FACTS, lines(RECORDED, H100), Console(file=output, width=150))
    printed = output.getvalue()
    for text in (
        "700.00 W",
        "3.02 TB/s, 791 TFLOP/s",
        "1500 GB/s",
        "failed: rope triton, LLaMA 2 7B: RuntimeError: [3] of 33",
        "not comparable: liger: ModuleNotFoundError: no liger",
    ):
        assert text in printed, text


def test_a_report_without_timings() -> None:
    output = io.StringIO()
    print_report(FACTS, (), Console(file=output, width=150))
    assert "commit abc1234" in output.getvalue()
