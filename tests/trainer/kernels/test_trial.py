"""Before a run operators are tried; what fails is replaced on all ranks and said, or refused."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.kernels import backends
from trainer import parallel
from trainer.kernels import attention_flash, library, registry, trial
from trainer.kernels.registry import Backend
from trainer.run import choose_kernels

BACKENDS = ("reference",)
CPU = torch.device("cpu")
NAMES = {"attention", "cross_entropy", "gather_scale", "rms_norm", "rope", "swiglu"}
BEST: dict[str, Backend] = {
    **dict.fromkeys(NAMES, "triton"),
    "attention": "flash",
    "gather_scale": "cuda",
}

Planted = dict[tuple[str, Backend], Exception | float]


@pytest.fixture(autouse=True)
def undo() -> Iterator[None]:
    """What a test has chosen."""
    with registry.chosen("auto", CPU):
        yield


def install(
    monkeypatch: pytest.MonkeyPatch, planted: Planted, missing: frozenset[Backend] = frozenset()
) -> list[tuple[str, Backend]]:
    """The CPU has everything that a GPU may have but `missing`, and an operator is a number: 1, or
    what is planted. Returns what was tried."""
    tried: list[tuple[str, Backend]] = []

    def candidates(operator: registry.Operator, kind: str, gpu: object) -> set[Backend]:
        has: set[Backend] = {"triton"}
        if operator.compiled and registry._choice != "triton":
            has.add("cuda")
        if operator.fused is not None and registry._choice != "triton":
            has |= {"flash", "sdpa"}
        return has - missing if registry._choice != "reference" else set()

    def case(name: str) -> Callable[[trial.Draw], list[Tensor]]:
        def run(draw: trial.Draw) -> list[Tensor]:
            backend = registry.which(name, CPU)
            tried.append((name, backend))
            result = planted.get((name, backend), 1.0)
            if isinstance(result, Exception):
                raise result
            return [torch.tensor([1.0, result])]

        return run

    monkeypatch.setattr(registry, "_candidates", candidates)
    monkeypatch.setattr(registry, "_check", lambda choice, kind: None)
    monkeypatch.setattr(trial, "CASES", {name: case(name) for name in NAMES})
    return tried


def everywhere(backend: Backend, error: Exception) -> Planted:
    return {(name, backend): error for name in NAMES}


def test_everything_works_here(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On a GPU: what a run would choose computes what the reference does."""
    choices: dict[str, registry.Kernels] = {"reference": "reference", "triton": "triton"}
    device = torch.device(backends.DEVICE)
    running = trial.settle(choices.get(backend, "auto"), device)
    assert running == {name: registry.which(name, device) for name in NAMES}
    assert "passed over" not in capsys.readouterr().err


def test_what_works_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = install(monkeypatch, {})
    assert trial.settle("auto", CPU) == BEST
    assert {pair for pair in tried if pair[1] != "reference"} == set(BEST.items())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wrong", [RuntimeError("CUDA error: no\n kernel image"), 1.2, torch.nan])
def test_the_next_implementation_replaces_one_that_fails(
    wrong: Exception | float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {("gather_scale", "cuda"): wrong, ("attention", "flash"): wrong})
    replaced: dict[str, Backend] = {"gather_scale": "triton", "attention": "sdpa"}
    assert trial.settle("auto", CPU) == {**BEST, **replaced}
    assert registry.which("gather_scale", CPU) == "triton"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    names = {"attention": "FlashAttention", "gather_scale": "the compiled CUDA code"}
    for line, (name, words) in zip(sorted(told), names.items(), strict=True):
        assert line.startswith(f"warning: {name} fails in {words}: ")
        assert line.endswith(f": {words} is passed over")
        assert "RuntimeError: CUDA error: no kernel image" in line or "is off by" in line


def test_pytorchs_own_attention_is_replaced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("No execution plans support the graph")
    install(monkeypatch, {("attention", "flash"): error, ("attention", "sdpa"): error})
    assert trial.settle("auto", CPU) == {**BEST, "attention": "triton"}


def test_a_package_that_does_not_work_at_all_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Triton that cannot be imported, or finds no C compiler."""
    install(monkeypatch, everywhere("triton", OSError("libtriton.so: undefined symbol")))
    kept: dict[str, Backend] = {"attention": "flash", "gather_scale": "cuda"}
    assert trial.settle("auto", CPU) == {**dict.fromkeys(NAMES, "reference"), **kept}
    assert "libtriton.so: undefined symbol: Triton is passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "planted", "message"),
    [
        ("auto", ("swiglu", "triton"), "swiglu fails in Triton: .*use --kernels reference"),
        ("triton", ("rope", "triton"), "--kernels triton: rope fails in Triton: .*--kernels auto"),
        (
            "cuda",
            ("gather_scale", "cuda"),
            "--kernels cuda: gather_scale fails in .*--kernels auto",
        ),
        (
            "cuda",
            ("attention", "flash"),
            "--kernels cuda: attention fails in Flash.*--kernels auto",
        ),
        ("auto", ("rope", "reference"), "PyTorch itself cannot compute rope on cpu"),
    ],
)
def test_what_cannot_be_replaced_is_refused(
    choice: registry.Kernels,
    planted: tuple[str, Backend],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, {planted: RuntimeError("planted")})
    with pytest.raises(InputError, match=rf"{message}") as caught:
        trial.settle(choice, CPU)
    assert "RuntimeError: planted" in str(caught.value)


def test_the_reference_alone_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install(monkeypatch, everywhere("reference", RuntimeError())) == []
    assert trial.settle("reference", CPU) == dict.fromkeys(NAMES, "reference")


def test_a_device_that_is_lost_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {("rope", "triton"): RuntimeError("an illegal memory access")})

    def lost(*sizes: int, **options: object) -> Tensor:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch, "zeros", lost)
    with pytest.raises(InputError, match="cpu answers no more after rope was tried in Triton"):
        trial.settle("auto", CPU)


@pytest.mark.parametrize(
    ("attention", "words"), [("sdpa", "sdpa (cudnn)"), ("reference", "reference (cudnn)")]
)
def test_pytorchs_own_attention_is_named(
    attention: Backend, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU has several."""
    monkeypatch.setattr(trial, "sdpa_backend", lambda device: "cudnn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    running: dict[str, Backend] = {"attention": attention, "rope": "triton"}
    told = trial.describe(running, torch.device("cuda"))
    assert told == f"attention {words}, rope triton"
    assert trial.describe(running, CPU) == f"attention {attention}, rope triton"
    assert trial.describe({"attention": "flash"}, torch.device("cuda")) == "attention flash"


@pytest.mark.parametrize(
    ("capability", "version", "hint"),
    [((9, 0), 91002, True), ((9, 0), 91501, False), ((8, 0), 91002, False), ((9, 0), None, True)],
)
def test_a_cudnn_that_pytorch_does_not_prefer_is_said(
    capability: tuple[int, int],
    version: int | None,
    hint: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "sdpa_backend", lambda device: "flash")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    told = trial.describe({"attention": "sdpa"}, torch.device("cuda"))
    assert told.startswith("attention sdpa (flash")
    assert ("from cuDNN 9.15.1 on" in told) == hint


def test_random_numbers_of_a_run_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    trial.settle("auto", CPU)
    assert torch.equal(torch.rand(4), expected)


def test_packages_and_libraries_that_do_not_load_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, {})
    monkeypatch.setattr(library, "_problems", {"cpu": "does not load (undefined symbol: _Zabc)"})
    monkeypatch.setattr(attention_flash, "_problems", {"flash_attn": "OSError: libcudart.so.12"})
    trial.settle("reference", CPU)
    assert capsys.readouterr().err == ""
    trial.settle("auto", CPU)
    told = capsys.readouterr().err
    assert "_shorn_cpu.so does not load (undefined symbol: _Zabc)" in told
    assert told.count("warning:") == 1
    assert list(trial._notes("cuda")) == [
        "flash_attn is passed over, its import fails: OSError: libcudart.so.12"
    ]


def settled(planted: Planted, missing: frozenset[Backend], rank: int) -> object:
    """What a rank runs where `rank` has other operators, or the error that it stops with."""
    context = parallel.init(threads=1)
    here = dist.get_rank() == rank
    with pytest.MonkeyPatch.context() as patches:
        install(patches, planted if here else {}, missing if here else frozenset())
        try:
            choose_kernels("auto", context)
        except InputError as error:
            return str(error)
    return {name: registry.which(name, CPU) for name in NAMES}


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_run_the_same(rank: int, capfd: pytest.CaptureFixture[str]) -> None:
    failing: Planted = {("gather_scale", "cuda"): RuntimeError("driver")}
    first, second = run_ranks(settled, 2, failing, frozenset(), rank)
    assert first == second == {**BEST, "gather_scale": "triton"}
    told = capfd.readouterr().err
    assert told.count(f"gather_scale fails in the compiled CUDA code on rank {rank}") == 1


def test_what_not_all_ranks_have_is_passed_over(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = run_ranks(settled, 2, {}, frozenset({"flash", "cuda"}), 1)
    assert first == second == {**BEST, "gather_scale": "triton", "attention": "sdpa"}
    told = capfd.readouterr().err
    assert "attention: not every rank has FlashAttention, rank 1 would run PyTorch's own" in told


def test_all_ranks_stop_where_one_cannot_go_on() -> None:
    failing: Planted = {("swiglu", "triton"): RuntimeError("planted")}
    messages = run_ranks(settled, 2, failing, frozenset(), 1)
    assert messages[0] == messages[1]
    assert messages[0].startswith("swiglu fails in Triton on rank 1: RuntimeError: planted.")
