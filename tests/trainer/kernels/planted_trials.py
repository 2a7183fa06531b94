"""Operators that fail where the CPU stands in for a GPU, tried before a run; run by test_gpu.py.

The CPU takes implementations in the order in which a GPU takes them; Triton's are interpreted.
"""

from typing import Any

import pytest
import torch

from data.errors import InputError
from trainer.kernels import gather_scale, library, registry, rms_norm_triton, swiglu_triton, trial

pytestmark = pytest.mark.gpu
OTHERS = ("cross_entropy", "rms_norm", "rope", "swiglu")


@pytest.fixture(autouse=True)
def order(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = registry._candidates

    def of_a_gpu(operator: registry.Operator, kind: str, gpu: object) -> set[registry.Backend]:
        return candidates(operator, "cuda", None) - {"flash"}

    monkeypatch.setattr(registry, "_candidates", of_a_gpu)
    monkeypatch.setattr(library, "is_loaded", lambda kind: True)


def settle() -> dict[str, registry.Backend]:
    return trial.settle("auto", torch.device("cpu"))


def insufficient_driver(*arguments: Any) -> Any:
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")


def no_compiler(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_a_library_that_does_not_run_gives_way_to_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = gather_scale._run_forward

    def run(*arguments: Any) -> Any:
        if registry.which("gather_scale", "cpu") == "cuda":
            insufficient_driver()
        return forward(*arguments)

    monkeypatch.setattr(gather_scale, "_run_forward", run)
    kernels = dict.fromkeys(("gather_scale", *OTHERS), "triton")
    assert settle() == {**kernels, "attention": "sdpa"}
    told = capsys.readouterr().err
    assert (
        "warning: gather_scale fails in the compiled CUDA code: RuntimeError: CUDA driver" in told
    )
    assert "insufficient for CUDA runtime version" in told
    assert "the compiled CUDA code is passed over" in told


def test_a_backward_pass_that_fails_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swiglu_triton, "backward", insufficient_driver)
    with pytest.raises(InputError, match="swiglu fails in Triton: RuntimeError: CUDA driver"):
        settle()


def test_one_broken_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm_triton, "forward", insufficient_driver)
    with pytest.raises(InputError, match="Other Triton kernels work here: use --kernels reference"):
        settle()


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = swiglu_triton.forward
    monkeypatch.setattr(swiglu_triton, "forward", lambda *arguments: 1.1 * forward(*arguments))
    with pytest.raises(
        InputError, match="swiglu fails in Triton: WrongResultError: a result is off"
    ):
        settle()


def test_without_a_compiler_pytorch_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "triton_module", no_compiler)
    running = settle()
    compiled = running.pop("gather_scale")
    assert running == {**dict.fromkeys(OTHERS, "reference"), "attention": "sdpa"}
    assert compiled in ("cuda", "reference")
    told = capsys.readouterr().err
    assert "Failed to find C compiler" in told and "Triton is passed over" in told
