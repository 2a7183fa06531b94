"""Fits of loss over model size: exact on known curves, refused on data that has none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import InputError
from trainer.scaling import FittedReference, fit_scaling, fitted_reference, read_sizes

SIZES = (6_738_000_000, 13_016_000_000, 68_977_000_000)
TARGETS = (1_345_423_360, 2_701_560_320, 373_867_520)
PUBLISHED = {
    "cc": ((1.7520, 1.6680, 1.4621), (1.9643, 1.8712, 2.1401)),
    "github": ((0.6216, 0.5791, 0.4890), (0.7459, 0.6883, 0.8694)),
    "book": ((1.9063, 1.8242, 1.6450), (2.1393, 2.0325, 2.3625)),
    "stackexchange": ((1.4482, 1.3936, 1.2805), (1.6117, 1.5353, 1.7791)),
    "wiki": ((1.4844, 1.3945, 1.2118), (1.7590, 1.6297, 2.0470)),
    "arxiv": ((1.2637, 1.2109, 1.1148), (1.4449, 1.3560, 1.6637)),
    "c4": ((1.9219, 1.8486, 1.6848), (2.1251, 2.0328, 2.3139)),
}
"""LLaMA-2 7B, 13B and 70B, and what Sheared LLaMA (arXiv 2310.06694, appendix B) fitted to them for
its 1.3B, 2.7B and 370M."""


def curve(sizes: tuple[int, ...], a: float, b: float, c: float) -> dict[int, float]:
    return {size: a * size**-b + c for size in sizes}


def write(path: Path, domains: dict[str, dict[int, float]]) -> Path:
    sizes: dict[str, dict[str, float]] = {}
    for domain, losses in domains.items():
        for size, loss in losses.items():
            sizes.setdefault(str(size), {})[domain] = loss
    path.write_text(json.dumps({"sizes": sizes}))
    return path


def published(path: Path, parameters: int) -> FittedReference:
    domains = {d: dict(zip(SIZES, measured, strict=True)) for d, (measured, _) in PUBLISHED.items()}
    return fitted_reference(write(path, domains), set(PUBLISHED), parameters)


@pytest.mark.parametrize("domain", sorted(PUBLISHED.keys() - {"cc"}))
def test_published_losses(domain: str) -> None:
    measured, expected = PUBLISHED[domain]
    fit = fit_scaling(dict(zip(SIZES, measured, strict=True)), domain)
    assert fit.c > 0 and fit.error < 1e-6 and fit.left_out_error is None
    assert [fit.loss(size) for size in TARGETS] == pytest.approx(expected, abs=1e-3)


def test_an_irreducible_loss_below_zero_is_held_at_zero(tmp_path: Path) -> None:
    """The published curve of cc has c = -2.80. A power law without c misses the sizes by 0.002 nats
    and lies 0.02 above the published 1.3B."""
    measured, expected = PUBLISHED["cc"]
    fit = fit_scaling(dict(zip(SIZES, measured, strict=True)), "cc")
    assert fit.c == 0 and fit.a > 0 and fit.b == pytest.approx(0.078, abs=1e-3)
    assert fit.error == pytest.approx(0.0022, abs=1e-4)
    assert 0.02 < fit.loss(TARGETS[0]) - expected[0] < 0.03
    warnings = published(tmp_path / "fit.json", TARGETS[0]).warnings
    assert len(warnings) == 1 and warnings[0].startswith("cc: ") and "held at 0" in warnings[0]


def test_the_constrained_fit_is_the_best_power_law() -> None:
    """With c = 0 the residual must not shrink in any direction of (a, b)."""
    measured = np.array(PUBLISHED["cc"][0])
    fit = fit_scaling(dict(zip(SIZES, measured, strict=True)), "cc")
    n = np.array(SIZES, float)

    def squared(a: float, b: float) -> float:
        return float(((a * n**-b - measured) ** 2).sum())

    best = squared(fit.a, fit.b)
    for change in (-1e-4, 1e-4):
        assert squared(fit.a * (1 + change), fit.b) > best
        assert squared(fit.a, fit.b + change) > best
        assert squared(fit.a * (n.mean() ** change), fit.b + change) > best


def test_a_known_curve_is_recovered_from_any_number_of_sizes() -> None:
    sizes = (10**7, 10**8, 10**9, 10**10)
    for number in (3, 4):
        fit = fit_scaling(curve(sizes[-number:], 400.0, 0.34, 1.7), "c4")
        assert (fit.a, fit.b, fit.c) == pytest.approx((400.0, 0.34, 1.7), rel=1e-4)
    assert fit.left_out_error == pytest.approx(0, abs=1e-6)


def test_leave_one_out_sees_a_size_that_was_measured_differently(tmp_path: Path) -> None:
    losses = curve((10**8, 10**9, 10**10, 10**11), 60.0, 0.2, 1.0)
    losses[10**10] -= 0.15
    fit = fit_scaling(losses, "c4")
    assert fit.left_out_error is not None and fit.left_out_error > max(0.05, fit.error)
    path = write(tmp_path / "fit.json", {"c4": losses})
    fitted = fitted_reference(path, {"c4"}, 10**9)
    assert "leave-one-out" in fitted.notes[0]
    assert any("predicting one size from the others misses" in text for text in fitted.warnings)
    clean = curve((10**8, 10**9, 10**10, 10**11), 60.0, 0.2, 1.0)
    assert fitted_reference(write(path, {"c4": clean}), {"c4"}, 10**9).warnings == []


def test_sizes_that_no_curve_passes_near(tmp_path: Path) -> None:
    path = write(tmp_path / "fit.json", {"c4": {10**8: 3.0, 10**9: 2.9, 10**10: 1.5}})
    warnings = fitted_reference(path, {"c4"}, 10**9).warnings
    assert any("misses a measured loss by" in text for text in warnings)


@pytest.mark.parametrize(
    ("parameters", "far"), [(10**8, False), (99 * 10**6, True), (10**11, False), (10**12, True)]
)
def test_far_extrapolation_is_logged(tmp_path: Path, parameters: int, far: bool) -> None:
    losses = curve((10**9, 3 * 10**9, 10**10), 60.0, 0.2, 1.0)
    fitted = fitted_reference(write(tmp_path / "fit.json", {"c4": losses}), {"c4"}, parameters)
    assert [("outside the measured sizes" in text) for text in fitted.warnings] == [True] * far
    assert f"{parameters:,} parameters: {fitted.losses['c4']:.4f}" in fitted.notes[0]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({10**9: 2.0, 10**10: 1.9}, r"'c4' has losses of 2 model sizes.*at least 3"),
        (
            {10**9: 2.0, 10**10: 2.1, 10**11: 1.9},
            r"'c4' does not fall from 1,000,000,000 .*10,000,000,000",
        ),
        ({10**9: 2.0, 10**10: 1.9, 10**11: 1.9}, r"does not fall from 10,000,000,000"),
        ({10**9: 2.0, 10**10: float("nan"), 10**11: 1.9}, r"10,000,000,000 parameters is nan"),
        ({10**9: 2.0, 10**10: 1.0, 10**11: -0.1}, r"'c4' at 100,000,000,000 parameters is -0.1"),
    ],
)
def test_losses_that_cannot_be_fitted(losses: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_scaling(losses, "c4")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"sizes": []}',
        '{"sizes": {"7b": {"c4": 1.0}}}',
        '{"sizes": {"-5": {"c4": 1.0}}}',
        '{"sizes": {"5": {"c4": "low"}}}',
        '{"sizes": {"5": {"c4": true}}}',
        '{"sizes": {"5": 1.0}}',
        '{"sizes": {"5": {"c4": 1.0}, "5": {"c4": 2.0}}}',
        '{"sizes": {"5": {"c4": 1.0}, "05": {"c4": 2.0}}}',
        '{"sizes": {"5": {"c4": 1.0, "c4": 2.0}}}',
        '{"sizes": {"5": {"c4": 1.0}}, "sizes": {}}',
        '{"sizes": {"5": {"c4": NaN}}}',
        '{"sizes": {"5": {"c4": 1e999}}}',
        f'{{"sizes": {{"5": {{"c4": {"9" * 400}}}}}}}',
        f'{{"sizes": {{"{"9" * 400}": {{"c4": 1.0}}}}}}',
    ],
)
def test_files_of_another_form(tmp_path: Path, content: str) -> None:
    path = tmp_path / "fit.json"
    path.write_text(content)
    with pytest.raises(
        InputError, match=r"--reference-fit .*fit\.json: .*takes a JSON file of losses"
    ):
        read_sizes(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file .*--reference-fit takes"):
        read_sizes(tmp_path / "none.json")


def test_a_byte_order_mark_is_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text('{"sizes": {"5": {"c4": 1}}}', encoding="utf-8-sig")
    assert read_sizes(path) == {5: {"c4": 1}}
    path.write_text('{"sizes": {"5": {"c4": 1}}}', encoding="utf-16")
    with pytest.raises(InputError, match=r"fit\.json: not UTF-8 .*--reference-fit takes"):
        read_sizes(path)


def test_names_may_be_decomposed(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text('{"sizes": {"5": {"bu\u0308cher": 1}}}', encoding="utf-8")
    assert read_sizes(path) == {5: {"b\u00fccher": 1}}
    path.write_text('{"sizes": {"5": {"bu\u0308cher": 1, "b\u00fccher": 2}}}', encoding="utf-8")
    with pytest.raises(InputError, match="are one domain"):
        read_sizes(path)


@pytest.mark.parametrize("domains", [{"c4"}, {"c4", "github", "book"}, {"c4", "book"}])
def test_domains_of_the_data(tmp_path: Path, domains: set[str]) -> None:
    losses: dict[str, Any] = {d: curve(SIZES, 60.0, 0.2, 1.0) for d in ("c4", "github")}
    path = write(tmp_path / "fit.json", losses)
    assert set(fitted_reference(path, {"github", "c4"}, TARGETS[0]).losses) == {"c4", "github"}
    with pytest.raises(InputError, match=r"6,738,000,000 has losses of \['c4', 'github'\]"):
        fitted_reference(path, domains, TARGETS[0])
