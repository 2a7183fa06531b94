"""The static report says what kernels of known properties consist of."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from data.errors import InputError
from launch.bench_kernels.static import compile as static
from launch.bench_kernels.static import cuda as static_cuda
from launch.bench_kernels.static.compile import Failure, Record, compile_triton, occupancy_of
from launch.bench_kernels.static.sass import LOADS, Kernel, find_loops, parse
from trainer.kernels import registry

KNOWN = "tests.launch.bench_kernels.static.static_kernels"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def known() -> tuple[dict[str, Record], list[Failure]]:
    records, failures = compile_triton([90], KNOWN)
    return {record.kernel: record for record in records}, failures


@needs_triton
def test_widths_follow_alignment(known: tuple[dict[str, Record], list[Failure]]) -> None:
    records, _ = known
    assert (records["scale"].load_bits, records["scale"].store_bits) == (128, 128)
    # One element a thread.
    assert (records["narrow"].load_bits, records["narrow"].store_bits) == (32, 16)


@needs_triton
def test_dots_become_matrix_instructions(known: tuple[dict[str, Record], list[Failure]]) -> None:
    records, _ = known
    product, scale = records["product"], records["scale"]
    assert product.has_dot and product.tensor_core == "HGMMA"
    assert [loop.tensor_core for loop in product.loops if loop.tensor_core] == [4]
    assert not scale.has_dot and scale.tensor_core is None and scale.loops == []
    # Operations are not declared: what bounds it is not known.
    assert product.predicted_us is None


@needs_triton
def test_spills_are_found_in_the_loop(known: tuple[dict[str, Record], list[Failure]]) -> None:
    records, _ = known
    assert records["spilling"].spill_bytes > 0
    assert max(loop.local_accesses for loop in records["spilling"].loops) > 0
    assert records["scale"].spill_bytes == 0


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_failure(
    known: tuple[dict[str, Record], list[Failure]],
) -> None:
    _, failures = known
    assert [(failure.kernel, failure.arch) for failure in failures] == [("wrong", "sm_90")]
    assert "initial type int32" in failures[0].message


def test_facts_that_no_record_has_a_place_for_are_refused() -> None:
    facts: dict[str, Any] = {"kernel": "k", "arch": 90, "threads": 32}
    facts |= {"shared_bytes": 0, "has_dot": False}
    code = Kernel(instructions=[], name="k", registers=8, stack_bytes=0, shared_bytes=0, loops=[])
    assert static.make_record(code, backend="triton", **facts).kernel == "k"
    with pytest.raises(TypeError, match="bytes_move"):
        static.make_record(code, backend="triton", **(facts | {"bytes_move": 1}))


@needs_triton
def test_prediction_is_traffic_over_the_ceiling(
    known: tuple[dict[str, Record], list[Failure]],
) -> None:
    records, _ = known
    scale = records["scale"]
    assert scale.bytes_moved is not None and scale.predicted_us is not None
    assert scale.predicted_us == pytest.approx(1e6 * scale.bytes_moved / 3.015e12)
    assert scale.bytes_over_minimum == 1


@needs_triton
def test_a_compiler_that_dies_is_one_kernels_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel it died of is named, and those after it are compiled."""
    answers: list[list[dict[str, object]]] = [
        [{"kernel": "a", "arch": 90, "finished": True}, {"kernel": "b", "arch": 90}],
        [{"kernel": "c", "arch": 90, "finished": True}],
    ]
    asked: list[object] = []

    class Worker:
        def __init__(self, request: dict[str, object]) -> None:
            asked.append(request["done"])
            self.status = -6 if len(asked) == 1 else 0
            self.message = "Aborted"

        def __iter__(self) -> Iterator[dict[str, object]]:
            return iter(answers[len(asked) - 1])

    monkeypatch.setattr(static, "_Worker", Worker)
    found = static._run_worker([90], KNOWN, static.ROOT, lambda: None)
    assert [facts["kernel"] for facts in found] == ["a", "b", "c"]
    assert found[1]["error"] == "compiler ended with status -6: Aborted"
    assert asked == [[], [("a", 90), ("b", 90)]]


@needs_triton
def test_the_interpreter_does_not_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in static._environment()
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_without_triton_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="triton is not installed"):
        static.require_triton()


def test_traffic_is_that_of_the_tensors() -> None:
    """Each once; partial sums both ways, of which an operator needs what they add up to."""
    pytest.importorskip("triton")
    from launch.bench_kernels.static.record import traffic

    x, scale = torch.empty(8, 4, device="meta"), torch.empty((), device="meta")
    partial, logits = (torch.empty(2, 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    assert traffic({"x": x, "absent": x, "scale": scale, "M": 8}) == {
        "bytes_moved": 128,
        "minimum_bytes": 128,
    }
    assert traffic({"x": x, "row_partial": partial}) == {"bytes_moved": 256, "minimum_bytes": 160}
    assert traffic({"logits": logits}) == {"bytes_moved": 128, "minimum_bytes": 128}


SASS = """
.L_x_9:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.64 [R76], [R90.64], P6 ;
        /*0050*/                   BRA.U UP0, `(.L_x_2) ;
        /*0060*/               @P1 BRA `(.L_x_4) ;
.L_x_5:
        /*0070*/                   STL [R1], R5 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   LDG.E.128 R2, desc[UR4][R2.64] ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/                   MUFU.RCP R2, R2 ;
        /*00c0*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*00d0*/                   BRA `(.L_x_6);
"""


def test_loops_are_those_of_the_control_flow() -> None:
    """The block behind the end belongs to the outer loop, and what it jumps over does not make
    another; the endless jump that pads a kernel is no loop."""
    instructions, labels = parse(SASS.splitlines())
    inner, outer = find_loops(instructions, labels)
    assert inner.instructions[0].opcode == "LDGSTS.E.BYPASS.LTC128B.64"
    assert (len(inner.instructions), inner.local_accesses) == (2, 0)
    assert (len(outer.instructions), outer.local_accesses) == (9, 1)
    assert outer.counts["MUFU"] == 1 and outer.counts["EXIT"] == 0
    assert outer.widths(LOADS) == {64: 1, 16: 2}
    kernel = Kernel(
        instructions=instructions,
        name="k",
        registers=32,
        stack_bytes=8,
        shared_bytes=0,
        loops=[inner, outer],
    )
    # The wide load stands outside of the loops.
    assert kernel.widths(LOADS) == {128: 1, 64: 1, 16: 2}
    assert kernel.main_width(LOADS) == 64
    assert kernel.spill_bytes == 8


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "expected"),
    [
        (32, 0, 256, 90, (1.0, "registers")),
        (64, 0, 256, 90, (0.5, "registers")),
        (65, 0, 256, 90, (0.375, "registers")),
        (255, 0, 256, 90, (0.125, "registers")),
        (32, 100 << 10, 256, 90, (0.25, "shared memory")),
        (32, 100 << 10, 256, 80, (0.125, "shared memory")),
        (16, 0, 1024, 90, (1.0, "threads")),
        (16, 0, 32, 90, (0.5, "blocks")),
    ],
)
def test_occupancy_is_that_of_the_scarcest_resource(
    registers: int, shared: int, threads: int, arch: int, expected: tuple[float, str]
) -> None:
    assert occupancy_of(registers, shared, threads, arch) == expected


def test_every_cuda_operator_is_reported() -> None:
    operators = {path.name.removesuffix("_kernels.cuh") for path in static_cuda.CSRC.glob("*.cuh")}
    reported = {path.name.removesuffix("_instances.cu") for path in static_cuda.sources()}
    assert operators and operators == reported


@needs_triton
def test_kernels_have_names_of_their_own() -> None:
    """Of every operator."""
    from launch.bench_kernels.static.kernels import launches

    names = [launch.name for launch in launches()]
    assert len(set(names)) == len(names)
    operators = {operator.name for operator in registry.operators()}
    assert operators <= {name.split(".")[0] for name in names}
