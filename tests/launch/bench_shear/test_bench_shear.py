"""The shearing benchmark times what it names and reports its ratios."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from launch.bench_shear import __main__ as bench_shear
from launch.bench_shear import timing as shear_timing
from launch.bench_shear.config import BenchShearConfig

TINY: dict[str, Any] = {
    "hidden": 64,
    "layers": 3,
    "heads": 4,
    "ffn": 96,
    "vocabulary": 64,
    "target": "layers=2,hidden=32,heads=2,ffn=48",
    "batch": 2,
    "seq_len": 16,
    "threads": 1,
    "repeats": 2,
}
RATIOS = (
    "compact_target_over_target_cpt",
    "step_target_over_target_cpt",
    "hardened_over_target_cpt",
    "dense_masked_over_dense",
    "dense_masked_step_over_dense",
    "muon_step_over_adamw",
    "frozen_step_over_trained",
    "gather_scale_share",
)


def test_ratios_follow_from_the_measured_steps(capsys: pytest.CaptureFixture[str]) -> None:
    result = shear_timing.measure(BenchShearConfig(**TINY))
    assert set(result["seconds"]) == {
        *("dense source", "target", "dense masked"),
        *(f"compact, {percent}% of the way" for percent in (0, 25, 50, 75)),
        *("compact at target", "compact, hardened"),
        *("compact, 50% of the way, weights frozen", "target, by Muon"),
    }
    held = result["held_bytes"]
    dense, frozen = held["dense source"], held["compact, 50% of the way, weights frozen"]
    # A weight with its gradient and two moments in fp32, and a weight alone; step counts are small.
    assert frozen * 4 <= dense < frozen * 4.01
    assert held["target, by Muon"] < held["target"]
    for times in result["seconds"].values():
        assert 0 < times["forward_backward"] < times["step"]
    assert all(result[name] > 0 for name in RATIOS)
    assert result["gather_scale_share"] < 1
    assert result["source"] == "layers=3,hidden=64,heads=4,kv-heads=4,ffn=96"
    shear_timing.print_result(result)
    printed = capsys.readouterr().out
    assert all(name in printed for name in RATIOS)
    assert set(result["spread"]) == set(result["seconds"])
    shear_timing.print_result(result | {"busy": "too busy to time: a"})
    assert "too busy to time: a; measure again" in capsys.readouterr().err


def test_ratios_are_medians_over_neighbouring_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs slower in each round changes no ratio."""
    work = {"compact at target": 3.0, "target": 2.0, "dense masked": 8.0, "dense source": 4.0}
    rounds: dict[str, int] = {}

    def run(self: shear_timing.Variant, clock: shear_timing.Clock) -> tuple[float, float]:
        name = names[id(self)]
        rounds[name] = rounds.get(name, 0) + 1
        seconds = work.get(name, 1.0) * 10.0 ** rounds[name]
        return seconds, 2 * seconds

    names: dict[int, str] = {}
    alternate = shear_timing._alternate

    def remember(variants: dict[str, shear_timing.Variant], *rest: Any) -> Any:
        names.update({id(variant): name for name, variant in variants.items()})
        return alternate(variants, *rest)

    monkeypatch.setattr(shear_timing, "_alternate", remember)
    monkeypatch.setattr(shear_timing.Variant, "run", run)
    result = shear_timing.measure(BenchShearConfig(**TINY | {"repeats": 3}))
    assert result["compact_target_over_target_cpt"] == pytest.approx(1.5)
    assert result["dense_masked_over_dense"] == pytest.approx(2.0)


def test_the_timed_steps_run_at_the_sparsity_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[int]] = {}
    run = shear_timing.Variant.run

    def watch(self: shear_timing.Variant, clock: shear_timing.Clock) -> tuple[float, float]:
        taken = run(self, clock)
        if self.shear is not None:
            seen.setdefault(self.step, set()).add(
                int((self.shear.z["intermediate"] > 0).sum(-1)[0])
            )
        return taken

    monkeypatch.setattr(shear_timing.Variant, "run", watch)
    shear_timing.measure(BenchShearConfig(**TINY))
    # 499 and later steps of 1,000 are held at the target; 0% is the first.
    assert min(seen[0]) > 80
    assert seen[748] == {48} and seen[998] == {48}
    assert min(seen[124]) > min(seen[374]) > 48


def test_the_command_writes_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = dict.fromkeys(RATIOS, 1.0)
    monkeypatch.setattr(shear_timing, "measure", lambda config: written)
    monkeypatch.setattr(shear_timing, "print_result", lambda result: None)
    flags = ["bench_shear", "--json", str(tmp_path / "out.json"), "--repeats", "1"]
    monkeypatch.setattr("sys.argv", flags)
    bench_shear.main()
    assert json.loads((tmp_path / "out.json").read_text()) == written
    monkeypatch.setattr("sys.argv", ["bench_shear", "--json", str(tmp_path)])
    monkeypatch.delattr(shear_timing, "measure")
    with pytest.raises(InputError, match=r"--json .* is a folder"):
        bench_shear.main()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": 60, "heads": 8}, "--hidden 60"),
        ({"repeats": 0}, "--repeats 0"),
        ({"heads": 0}, "--heads 0"),
        ({"seq_len": 1}, "--seq-len 1: must be at least 2"),
        ({"micro_batch": 0}, "--micro-batch 0"),
        ({"target": "speedup=2"}, "--target 'speedup=2': budgets are resolved by pruner.shear"),
        ({"batch": 2, "micro_batch": 4}, "--micro-batch 4"),
        ({"target": "ffn=1000"}, "ffn=1000"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        shear_timing.measure(BenchShearConfig(**TINY | changes))


def test_a_default_that_does_not_fit_the_source_is_answered_with_one_that_does() -> None:
    smaller = {name: TINY[name] for name in ("hidden", "layers", "heads", "ffn")}
    with pytest.raises(InputError, match=r"the default --target .* does not fit this") as caught:
        shear_timing.measure(BenchShearConfig(**smaller))
    advised = str(caught.value).rpartition(" ")[2]
    measured = shear_timing.measure(BenchShearConfig(**TINY | {"target": advised, "repeats": 1}))
    assert measured["target"] == advised


@pytest.mark.parametrize(("hidden", "heads", "advice"), [(512, 12, 504), (64, 7, 70), (36, 4, 32)])
def test_widths_of_heads_are_even(hidden: int, heads: int, advice: int) -> None:
    with pytest.raises(
        InputError, match=rf"--hidden {hidden}: .* use for example --hidden {advice}$"
    ):
        BenchShearConfig(hidden=hidden, heads=heads)
    # The advice works: the model can be described.
    sizes = {**TINY, "hidden": advice, "heads": heads}
    assert shear_timing.model_config(BenchShearConfig(**sizes)).head_dim % 2 == 0
