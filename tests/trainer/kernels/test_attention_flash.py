"""FlashAttention is called as its versions are, only where they compute what is asked for."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.kernels.test_attention import formula
from trainer.kernels import attention_flash, registry
from trainer.kernels.attention import _visible, attention, sdpa_backend

ROOT = Path(__file__).resolve().parents[3]
UNLIMITED = {"flash_attn_interface": -1, "flash_attn.cute": None, "flash_attn": -1}


class Installed:
    """Stands for one installed version, with the arguments that we give; keeps its calls."""

    def __init__(self, module: str, returns_logsumexp: bool) -> None:
        self.module = module
        self.returns_logsumexp = returns_logsumexp
        self.calls: list[dict[str, Any]] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int | None, int | None],
        deterministic: bool,
    ) -> Any:
        self.calls.append({"window": window_size, "deterministic": deterministic})
        left, right = window_size
        assert causal and right == 0
        window = None if left == UNLIMITED[self.module] else 1 + (left or 0)
        result = formula(*(x.double() for x in (q, k, v)), None, None, window, softmax_scale)
        context = result.to(q.dtype)
        return (context, torch.zeros(())) if self.returns_logsumexp else context


@pytest.fixture(params=[*UNLIMITED])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """One version is installed beside a GPU it is for, whose tensors are on the CPU."""
    version = Installed(request.param, request.param == "flash_attn.cute")
    use(version, monkeypatch, capability=8 if request.param == "flash_attn" else 9)
    monkeypatch.setattr(registry, "which", lambda name, device: "flash")
    return version


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found installed is looked for again."""
    monkeypatch.setattr(attention_flash, "_problems", {})
    for found in (attention_flash._choose, attention_flash._function):
        found.cache_clear()
    yield
    for found in (attention_flash._choose, attention_flash._function):
        found.cache_clear()


def use(version: Installed, monkeypatch: pytest.MonkeyPatch, capability: int = 9) -> None:
    # Operators look for packages when they are first imported.
    registry.operators()
    for name in UNLIMITED:
        monkeypatch.setitem(sys.modules, name, version if name == version.module else None)
    if "." in version.module:
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))


def draw(dtype: torch.dtype = torch.bfloat16, head_dim: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 20, n, head_dim).to(dtype).requires_grad_() for n in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 1, 7, 20, 50])
def test_computes_attention(installed: Installed, window: int | None) -> None:
    """Also with a mask, whose gradient is that of the output's scale."""
    leaves = [*draw(), torch.tensor([0.0, 0.3, 1.0, 2.0], requires_grad=True)]
    found = attention(*leaves[:3], head_mask=leaves[3], window=window, scale=0.2)
    assert len(installed.calls) == 1
    expected = formula(*leaves[:3], leaves[3], None, window, 0.2)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=0.03, rtol=0.02)
    outer = torch.randn_like(found)
    gradients = torch.autograd.grad(found, leaves, outer)
    wanted = torch.autograd.grad(expected, leaves, outer.to(expected.dtype))
    assert gradients[3][0] == 0
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=0.3, rtol=0.05)


def test_is_deterministic_where_that_is_asked_for(installed: Installed) -> None:
    attention(*draw())
    torch.use_deterministic_algorithms(True)
    try:
        attention(*draw())
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in installed.calls] == [False, True]


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 16), (torch.float64, 16), (torch.bfloat16, 12), (torch.bfloat16, 264)],
    ids=str,
)
def test_leaves_the_rest_to_others(installed: Installed, dtype: torch.dtype, head_dim: int) -> None:
    tensors = draw(dtype, head_dim)
    found = attention(*tensors)
    assert not installed.calls
    torch.testing.assert_close(found, formula(*tensors).to(dtype), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("fused", registry.FUSED)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("option", [{}, {"window": 7}, {"documents": torch.ones(2, 20).long()}])
def test_masks_of_all_pairs_are_left_to_kernels_where_there_are_some(
    fused: str, kernels: bool, option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them, and for what they do not compute, PyTorch's own attention runs."""
    asked: list[tuple[int, ...]] = []

    def operator(query: Tensor, *rest: Any) -> tuple[Tensor, None]:
        asked.append(tuple(query.shape))
        return query, None

    monkeypatch.setattr(registry, "which", lambda name, device: fused)
    monkeypatch.setattr(registry, "has_kernels", lambda *_: kernels)
    monkeypatch.setattr(attention_flash, "find", lambda query: None)
    monkeypatch.setattr(torch.ops.shorn, "attention", operator)
    for dtype in (torch.float32, torch.float64):
        tensors = draw(dtype)
        found = attention(*tensors, **option)
        if dtype == torch.float64 or not kernels or not option:
            expected = formula(*tensors, None, option.get("documents"), option.get("window"))
            torch.testing.assert_close(found, expected.to(dtype))
    assert asked == ([(2, 20, 4, 16)] if kernels and option else [])


def test_the_mask_of_a_window_is_that_of_one_row() -> None:
    visible = _visible(torch.zeros(5, 20, 2, 8), None, 7)
    assert visible is not None and visible.shape == (1, 1, 20, 20)


def test_documents_are_left_to_others(installed: Installed) -> None:
    tensors = draw(torch.float64)
    documents = torch.arange(20).div(6, rounding_mode="floor").expand(2, 20)
    found = attention(*tensors, documents=documents)
    assert not installed.calls
    torch.testing.assert_close(found, formula(*tensors, None, documents))


def test_wrong_input_is_refused(installed: Installed) -> None:
    query, key, _ = draw()
    with pytest.raises(ValueError, match=r"attention: value must be \[2, 20, 2, 16\]"):
        attention(query, key, key[:1])
    assert not installed.calls


def test_is_not_traced(installed: Installed) -> None:
    """A compiled call is one graph, of PyTorch's own attention."""
    query, key, value = draw(torch.float16)
    torch._dynamo.reset()
    found = torch.compile(attention, fullgraph=True, backend="eager")(query, key, value)
    assert not installed.calls
    expected = formula(query, key, value).to(found.dtype)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("module", "capability", "head_dim", "fits"),
    [
        ("flash_attn_interface", 8, 64, False),
        ("flash_attn_interface", 9, 192, True),
        ("flash_attn_interface", 9, 200, False),
        ("flash_attn_interface", 10, 64, False),
        ("flash_attn.cute", 8, 64, False),
        ("flash_attn.cute", 10, 128, True),
        ("flash_attn.cute", 10, 192, False),
        ("flash_attn", 7, 64, False),
        ("flash_attn", 8, 256, True),
        ("flash_attn", 9, 128, False),
        ("flash_attn", 10, 128, False),
        ("flash_attn", 12, 64, True),
    ],
)
def test_takes_what_fits_the_gpu(
    module: str, capability: int, head_dim: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Installed(module, False), monkeypatch, capability)
    query = draw(torch.bfloat16, head_dim)[0]
    library = attention_flash.find(query)
    assert (library is not None and library.module) == (fits and module)
    # Version 2 runs there too, and is timed beside what runs instead.
    if module == "flash_attn" and capability in (9, 10):
        library = attention_flash.find(query, preferred=False)
        assert library is not None and library.module == module


def test_is_named_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in names or None)
    assert attention_flash.backend() == "sdpa"
    names.add("flash_attn")
    assert attention_flash.backend() == "flash"


@pytest.mark.parametrize(
    ("module", "capability", "chosen"),
    [
        ("flash_attn_interface", 8, "sdpa"),
        ("flash_attn_interface", 9, "flash"),
        ("flash_attn.cute", 10, "flash"),
        ("flash_attn", 7, "sdpa"),
        ("flash_attn", 8, "flash"),
        ("flash_attn", 9, "sdpa"),
        ("flash_attn", 10, "sdpa"),
        ("flash_attn", 12, "flash"),
    ],
)
def test_is_chosen_where_it_knows_the_gpu(
    module: str, capability: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Installed(module, False), monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {1: capability}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (capabilities[device.index], 0)
    )
    with registry.chosen("auto", "cuda:1") as running:
        assert running["attention"] == chosen == registry.which("attention", "cuda")


def test_is_not_chosen_where_it_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, but built for another PyTorch, say."""
    use(Installed("none of them", False), monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with registry.chosen("auto", "cuda") as running:
        assert running["attention"] == "sdpa"
    assert attention_flash.problems() == {}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart"),
        (
            "raise ImportError('undefined symbol: _ZN3c105ErrorC2E')",
            "ImportError: undefined symbol",
        ),
        ("import a_package_that_it_needs", "ModuleNotFoundError: No module named 'a_package"),
        ("raise TypeError", "TypeError"),
    ],
)
def test_an_installed_package_that_does_not_load_is_named(
    code: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(Installed("none of them", False), monkeypatch, capability=9)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    (tmp_path / "flash_attn_interface.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_flash.backend(torch.device("cuda")) == "sdpa"
    assert list(attention_flash.problems()) == ["flash_attn_interface"]
    assert attention_flash.problems()["flash_attn_interface"].startswith(told)


def test_which_of_its_own_pytorch_takes_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sdpa_backend(torch.device("cpu")) in ("flash", "math")
    for number, name in enumerate(("math", "flash", "efficient", "cudnn", "overrideable")):
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, number=number, **__: number)
        assert sdpa_backend(torch.device("cpu")) == name
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert sdpa_backend(torch.device("cpu")) == "unknown"


@pytest.mark.slow
def test_version_4_compiles_without_a_gpu() -> None:
    """Both passes for sm_90, through our call, at shapes that we use."""
    pytest.importorskip("flash_attn.cute", reason="needs flash-attn-4")
    environment = {
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.trainer.kernels.compile_flash"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("compiled") == 4
