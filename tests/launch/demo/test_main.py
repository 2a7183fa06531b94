"""The demo end to end on a tiny model, twice; and what its options refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.errors import InputError
from launch.demo import __main__ as demo
from launch.demo.config import DemoConfig
from launch.demo.stages import Demo, available_ranks, resolve_precision
from tests.conftest import ROOT
from tests.factories import write_model


def run_demo(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    flags = {
        "--source": source,
        "--output": output,
        "--target": "layers=1,hidden=16,heads=2,kv-heads=1,ffn=32",
        "--seq-len": 64,
        "--shear-steps": 5,
        "--cpt-steps": 6,
        "--text-bytes": 100_000,
        "--sequences": 2,
        "--precision": "fp32",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return subprocess.run(
        [sys.executable, "-m", "launch.demo", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_demo_runs_and_reuses_its_stages(tmp_path: Path) -> None:
    source, output = write_model(tmp_path / "tiny"), tmp_path / "demo"
    first = run_demo(source, output)
    # A tiny random source teaches its sheared model nothing, so the comparison may go either way.
    assert first.returncode in (0, 1), first.stdout[-3000:] + first.stderr[-3000:]
    report = json.loads((output / "report" / "report.json").read_text())
    assert report["checks"][2]["holds"], report["checks"][2]
    assert list(report["rows"]) == ["source", "sheared", "sheared + CPT", "random + CPT"]
    assert all(Path(picture).is_file() for picture in report["pictures"])
    assert report["tokens"] == {"shear": 5 * 8 * 64, "cpt": 6 * 8 * 64, "random": 6 * 8 * 64}
    sizes = {name: row["parameters"] for name, row in report["rows"].items()}
    assert sizes["sheared"] == sizes["sheared + CPT"] == sizes["random + CPT"] < sizes["source"]
    assert str(output / "cpt" / "model") in first.stdout.replace("\n", "")
    second = run_demo(source, output)
    assert second.returncode == first.returncode
    assert second.stdout.count("finished before") == 9
    assert "$ " not in second.stdout


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match="--batch 8: must be a multiple of --ranks 3"):
        DemoConfig(ranks=3)
    with pytest.raises(InputError, match="--cpt-steps 0: must be at least 1"):
        DemoConfig(cpt_steps=0)
    with pytest.raises(InputError, match="--seq-len 1: must be at least 2"):
        DemoConfig(seq_len=1)
    with pytest.raises(InputError, match="--random-lr -1: must be above 0"):
        DemoConfig(random_lr=-1)


def test_a_target_that_the_source_cannot_give_is_refused_before_text_is_made(
    tmp_path: Path,
) -> None:
    source, output = write_model(tmp_path / "tiny"), tmp_path / "demo"
    default = Demo(DemoConfig(source=str(source), output=str(output)))
    with pytest.raises(InputError, match=r"the default --target .* does not fit this") as caught:
        default.run()
    advised = str(caught.value).rpartition(" ")[2]
    wrong = Demo(DemoConfig(source=str(source), output=str(output), target="layers=7"))
    with pytest.raises(InputError, match=r"layers=7 is outside 1\.\.2"):
        wrong.run()
    long = Demo(DemoConfig(source=str(source), output=str(output), seq_len=300))
    with pytest.raises(InputError, match=r"--seq-len 300 is longer than the model's 256 positions"):
        long.run()
    assert not (output / "text").exists()
    Demo(DemoConfig(source=str(source), output=str(output), target=advised))._require_target()


def test_a_stated_precision_is_kept() -> None:
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    assert resolve_precision("auto") in ("fp32", "bf16")


def test_ranks_fit_the_gpus_and_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_ranks(4, batch=8) == 4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, expected in {1: 1, 2: 2, 3: 2, 8: 4}.items():
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert available_ranks(4, batch=8) == expected


def test_missing_packages_are_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(InputError, match="needs gguf: pip install gguf accelerate matplotlib"):
        demo.main()
    assert not list(tmp_path.iterdir())
