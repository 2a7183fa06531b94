"""What runs is chosen once, is what was asked for, and never needs Triton or a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints
from unittest.mock import patch

import pytest
import torch

from data.errors import InputError
from launch.evaluate.config import EvaluateConfig
from trainer.config import TrainConfig
from trainer.kernels import attention_flash, library, registry
from trainer.kernels.swiglu import swiglu

ROOT = Path(__file__).resolve().parents[3]
NAMES = {"attention", "cross_entropy", "gather_scale", "rms_norm", "rope", "swiglu"}

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from data.errors import InputError
from trainer.kernels import library
from trainer.kernels import registry
from trainer.kernels.attention import attention
from trainer.kernels.cross_entropy import cross_entropy_
from trainer.kernels.gather_scale import gather_scale
from trainer.kernels.rms_norm import rms_norm
from trainer.kernels.rope import rope
from trainer.kernels.swiglu import swiglu
for choice in ("auto", "reference"):
    registry.choose(choice, "cpu")
    x = torch.ones(2, 4, requires_grad=True)
    y, _ = rms_norm(swiglu(x, gather_scale(x)), torch.ones(4), 1e-6)
    q, k = rope(y.view(1, 2, 1, 4), y.view(1, 2, 1, 4), torch.ones(2, 2), torch.zeros(2, 2))
    attention(q, k, k).sum().backward()
    cross_entropy_(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    print(x.grad.shape == x.shape)
print(set(registry.choose("auto", "cuda").values()) <= {"reference", "cuda", "flash", "sdpa"})
try:
    registry.choose("triton", "cuda")
except InputError as error:
    print(error)
"""


def test_runs_without_triton() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    *works, message = result.stdout.splitlines()
    assert works == ["True"] * 3
    assert message.startswith("--kernels triton needs the package triton, which is not installed")


def test_importing_operators_imports_no_triton() -> None:
    code = "import sys; from trainer.kernels.registry import choose; choose('auto', 'cpu'); "
    code += "print('triton' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.stdout.split() == ["False"], result.stderr


def test_every_operator_is_registered() -> None:
    assert {operator.name for operator in registry.operators()} == NAMES


@pytest.mark.parametrize("loaded", [True, False])
def test_what_runs_on_a_gpu(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(library, "is_loaded", lambda kind: loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled: dict[str, str] = {"attention": attention_flash.backend()}
    if loaded:
        compiled["gather_scale"] = "cuda"
    with registry.chosen("auto", "cuda") as running:
        assert running == {**dict.fromkeys(NAMES, "triton"), **compiled}
    with registry.chosen("triton", "cuda:1") as running:
        assert running == dict.fromkeys(NAMES, "triton")
        # The CPU tensors of such a run do not go through Triton.
        assert "triton" not in {registry.which(name, "cpu") for name in NAMES}
    with registry.chosen("reference", torch.device("cuda")) as running:
        assert running == dict.fromkeys(NAMES, "reference")
    if loaded:
        with registry.chosen("cuda", "cuda") as running:
            assert running == {**dict.fromkeys(NAMES, "triton"), **compiled}


@pytest.mark.parametrize("loaded", [True, False])
def test_what_runs_on_a_cpu(loaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_loaded", lambda kind: loaded)
    compiled = {"gather_scale": "c++"} if loaded else {}
    with registry.chosen("auto", "cpu") as running:
        assert running == {**dict.fromkeys(NAMES, "reference"), **compiled}
    with registry.chosen("reference", "cpu") as running:
        assert running == dict.fromkeys(NAMES, "reference")


@pytest.mark.parametrize(
    ("choice", "device", "message"),
    [
        (
            "triton",
            "cpu",
            "--kernels triton needs a GPU, and this run is on cpu: use --kernels auto",
        ),
        (
            "cuda",
            "cpu",
            "--kernels cuda needs a GPU and the compiled operators, and this run is on",
        ),
        ("fast", "cpu", "--kernels must be one of auto, reference, triton, cuda, got fast"),
    ],
)
def test_what_cannot_run_is_refused(
    choice: registry.Kernels, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = [registry.which(name, "cpu") for name in sorted(NAMES)]
    with pytest.raises(InputError) as caught:
        registry.choose(choice, device)
    assert str(caught.value).startswith(message)
    assert [registry.which(name, "cpu") for name in sorted(NAMES)] == before


def test_a_library_that_does_not_load_is_refused_by_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "_loaded", {"cpu"})
    monkeypatch.setattr(library, "_problems", {"cuda": "does not load (libcudart.so.13)"})
    with pytest.raises(InputError, match=r"_shorn_cuda.so does not load \(libcudart.so.13\): pip"):
        registry.choose("cuda", "cuda")


def test_commands_offer_every_choice() -> None:
    for config in (TrainConfig, EvaluateConfig):
        assert get_args(get_type_hints(config)["kernels"]) == get_args(registry.Kernels)


def test_a_choice_is_undone_after_errors() -> None:
    before = registry.which("gather_scale", "cpu")
    with pytest.raises(RuntimeError), registry.chosen("reference", "cpu"):
        assert registry.which("gather_scale", "cpu") == "reference"
        raise RuntimeError
    assert registry.which("gather_scale", "cpu") == before


@pytest.mark.parametrize("choice", ["reference", "auto"])
def test_the_reference_is_not_one_opaque_operator(choice: registry.Kernels) -> None:
    """torch.compile sees its operations, and can fuse them."""
    x = torch.ones(2, 4, requires_grad=True)
    with registry.chosen(choice, "cpu"):
        assert not registry.runs_kernels("swiglu", x)
        assert "swiglu" not in str(swiglu(x, x).grad_fn).lower()
    with patch.object(registry, "has_kernels", return_value=True):
        on_meta = torch.ones(2, 4, device="meta", requires_grad=True)
        assert "swiglu" in str(swiglu(on_meta, on_meta).grad_fn).lower()
