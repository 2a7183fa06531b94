"""Kernels with one mistake each, which the tests of the operators must notice.

Run by test_mutants.py in a process of its own, with TRITON_INTERPRET=1: for each mistake the Triton
module is replaced by a copy with it, and the tests run until the first that fails.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).resolve().parent
KERNELS = FOLDER.parents[2] / "trainer" / "kernels"
# Tests of everything but the kernels, and slow ones.
LEFT_OUT = "not (registered or compiles or refused or numeric or special or threads or precision)"


class Mutant(NamedTuple):
    """One mistake: in which operator, what it is, and the text it replaces."""

    operator: str
    mistake: str
    right: str
    wrong: str
    occurrence: int = 0
    part: str = ""

    @property
    def module(self) -> str:
        """Name of the module below trainer.kernels; an operator may have several."""
        return self.part or f"{self.operator}_triton"


_TILES = "attention_tiles"
_BACKWARD = "attention_backward_triton"

MUTANTS = (
    Mutant("attention", "no query sees itself", "] <= offs_m[:", "] < offs_m[:", 0, _TILES),
    Mutant("attention", "one key too few", "] >= first_n", "] > first_n", 0, _TILES),
    Mutant("attention", "one row too many", "offs_s < S)", "offs_s <= S)", 1, _TILES),
    Mutant(
        "attention", "keys of another row", "first + start_m)", "first + start_m + 1)", 0, _TILES
    ),
    Mutant("attention", "heads of another group", "off_h // GROUP * st", "off_h % GROUP * st"),
    Mutant("attention", "accumulator not rescaled", "acc * alpha[:, None]", "acc"),
    Mutant("attention", "denominator not rescaled", "l_i * alpha + tl", "l_i + tl"),
    Mutant("attention", "mask forgotten", "o * z", "o"),
    Mutant("attention", "diagonal not masked", "or start_n >= diagonal", "or start_n > diagonal"),
    Mutant("attention", "logsumexp of another base", "tl.log2(l_i)", "tl.log(l_i)"),
    *(
        Mutant("attention", mistake, right, wrong, 0, _BACKWARD)
        for mistake, right, wrong in (
            ("delta without the mask", "delta / tl.where(z == 0.0, 1.0, z)", "delta"),
            ("mask forgotten in dQ", "dq * z", "dq"),
            ("mask forgotten in dK, dV", "lse[None, :]) * z", "lse[None, :])"),
            ("delta forgotten in dK", "(dp - delta[None, :])", "dp"),
            ("diagonal not masked in dQ", "or start_n >= diagonal", "or start_n > diagonal"),
            ("diagonal not masked in dK, dV", "or start_m < diagonal", "or start_m < low"),
            (
                "documents forgotten in dK, dV",
                "offs_m[None, :] <= last_m",
                "offs_m[None, :] < S + last_m",
            ),
            ("one query too few in dK, dV", "<= last_m", "< last_m"),
            ("no key sees its query in dK, dV", "[:, None] <= offs_m", "[:, None] < offs_m"),
            ("last query of another key", "tl.minimum(start_n + BLOCK_N, S) - 1", "start_n"),
            ("one head of the group", "first_head + GROUP)", "first_head + 1)"),
            ("masked heads are computed", "tl.where(z == 0.0, high, low), high", "low, high"),
            (
                "values of wide heads forgotten",
                "HEAD_DIM, False, True",
                "HEAD_DIM, False, False",
            ),
            ("partial sums of one row", " + block) * H", ") * H"),
        )
    ),
    Mutant("rms_norm", "forward: one row too many", "(offs_m < M)[:", "(offs_m < M + 1)[:"),
    Mutant("rms_norm", "no bound on the last rows", "inverse, mask=offs_m < M)", "inverse)"),
    Mutant("rms_norm", "gain of the first column", "gain + offs_n,", "gain + offs_n * 0,"),
    Mutant("rms_norm", "dropped accumulation", "dw += dy", "dw = dy"),
    Mutant("rms_norm", "eps forgotten", "factor + eps", "factor"),
    Mutant("rms_norm", "scale forgotten", "* tl.load(scale)", "* 1.0"),
    Mutant("rms_norm", "wrong sign in the gradient", "wdy - xhat", "wdy + xhat"),
    Mutant("rms_norm", "programs share a partial sum", ") * N + offs_n\n", ") * 0 + offs_n\n"),
    Mutant("swiglu", "wrong derivative", "+ g - silu", "+ g - sigmoid"),
    Mutant("swiglu", "columns of the first block", "tl.program_id(1) * BLOCK_N", "0"),
    Mutant("swiglu", "stride of the other input", "offs_m * stride_up", "offs_m * stride_gate"),
    Mutant("swiglu", "backward: wrong factor", "(dy * silu).to", "(dy * g).to"),
    Mutant("swiglu", "one column too many", "(offs_n < N)", "(offs_n <= N)"),
    Mutant("rope", "wrong sign", "x1 * c - x2", "x1 * c + x2"),
    Mutant("rope", "inverse forgotten", "s = -s", "s = s"),
    Mutant("rope", "angles of the first row", "* stride_tb", "* 0"),
    Mutant("rope", "one channel too many", "present & (offs_d <", "present & (offs_d <="),
    Mutant("rope", "other channels kept", "offs_rest = 2 * half", "offs_rest = half"),
    Mutant("rope", "the keys have other heads", "H = KV_H", "H = H"),
    Mutant("rope", "heads of the first block", "(pid_h * BLOCK_H", "(pid_h * 0"),
    Mutant("cross_entropy", "row: another target", "offs_v == target", "offs_v == 0"),
    Mutant("cross_entropy", "walk: another target", "offs_v == target", "offs_v == 0", 1),
    Mutant("cross_entropy", "row: one column too many", "offs_v < V", "offs_v <= V"),
    Mutant("cross_entropy", "sum not rescaled", "l_i * rescale +", "l_i +"),
    Mutant("cross_entropy", "maximum of the tile", "tl.maximum(m_i, tl.max(x, 0))", "tl.max(x, 0)"),
    Mutant("cross_entropy", "second walk: first step left out", "steps - 1 - step", "steps - step"),
    Mutant("cross_entropy", "divergence not rescaled", "dot * rescale", "dot"),
    Mutant("cross_entropy", "stride of the other input", "* stride_teacher", "* stride"),
    Mutant("cross_entropy", "gradient not cooled", "(x - m_i) * inv_t", "(x - m_i)"),
    Mutant("cross_entropy", "wrong power", "alpha * temperature", "alpha * inv_t"),
    Mutant("cross_entropy", "alpha forgotten", "weight * (1.0 - alpha)", "weight", 1),
    Mutant("cross_entropy", "small beside large", "(m_i - x_target)", "m_i - x_target"),
    Mutant(
        "cross_entropy", "loss of an ignored token", "weight == 0, 0.0, loss", "False, 0.0, loss"
    ),
    Mutant("gather_scale", "forward: wrong mask index", "row_scale + src_m", "row_scale + offs_m"),
    Mutant("gather_scale", "what is left out is read", "pos >= 0", "offs < size"),
    Mutant(
        "gather_scale", "dropped accumulation", "column_sums += product", "column_sums = product"
    ),
    Mutant("gather_scale", "row mask forgotten", "+= product * z_m", "+= product"),
    Mutant("gather_scale", "column mask forgotten", "product * z_n, 1", "product, 1"),
    Mutant("gather_scale", "no zeros outside", "mask=within)", "mask=inside)"),
)


class Watcher:
    """Keeps the first test that fails, and why."""

    caught = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.caught:
            reason = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.caught = f"{report.nodeid.split('::')[1]}: {reason[0][1:].strip()[:120]}"


def plant(mutant: Mutant, folder: Path) -> None:
    """Replaces a Triton module by one with the mistake, and those of other mistakes by theirs."""
    for other in MUTANTS:
        sys.modules.pop(f"trainer.kernels.{other.module}", None)
    source = (KERNELS / f"{mutant.module}.py").read_text("utf-8")
    parts = source.split(mutant.right)
    assert len(parts) > mutant.occurrence + 1, mutant
    before = mutant.right.join(parts[: mutant.occurrence + 1])
    after = mutant.right.join(parts[mutant.occurrence + 1 :])
    file = folder / f"{abs(hash(mutant))}.py"
    file.write_text(before + mutant.wrong + after, "utf-8")
    name = f"trainer.kernels.{mutant.module}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def main(mutants: tuple[Mutant, ...] = MUTANTS) -> None:
    """Prints a line for each mutant: operator, mistake, and what caught it."""
    # The configured options belong to the terminal's plugin.
    arguments = ["-x", "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider"]
    arguments += ["-k", LEFT_OUT]
    with tempfile.TemporaryDirectory() as folder:
        for mutant in mutants:
            plant(mutant, Path(folder))
            watcher = Watcher()
            file = str(FOLDER / f"test_{mutant.operator}.py")
            status = pytest.main([*arguments, file], plugins=[watcher])
            assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), status
            caught = watcher.caught or "NOT CAUGHT"
            print(f"{mutant.operator}: {mutant.mistake}: {caught}", flush=True)
