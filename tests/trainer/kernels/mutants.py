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
    Mutant("attention", "no query sees itself", "] <= row[:", "] < row[:", 0, _TILES),
    Mutant("attention", "one key too few", "] >= first_key", "] > first_key", 0, _TILES),
    Mutant("attention", "one row too many", "row < length", "row <= length", 1, _TILES),
    Mutant("attention", "keys of another row", "(first + start)", "(first + start + 1)", 0, _TILES),
    Mutant("attention", "heads of another group", "head // GROUP * key", "head % GROUP * key"),
    Mutant("attention", "accumulator not rescaled", "total * shrink[:, None]", "total"),
    Mutant(
        "attention", "denominator not rescaled", "denominator * shrink + tl", "denominator + tl"
    ),
    Mutant("attention", "mask forgotten", "total * mask", "total"),
    Mutant("attention", "diagonal not masked", "or start >= diagonal", "or start > diagonal"),
    Mutant("attention", "logsumexp of another base", "tl.log2(denom", "tl.log(denom"),
    *(
        Mutant("attention", mistake, right, wrong, 0, _BACKWARD)
        for mistake, right, wrong in (
            ("delta without the mask", "along / tl.where(mask == 0.0, 1.0, mask)", "along"),
            ("mask forgotten in dQ", "d_queries * mask", "d_queries"),
            ("mask forgotten in dK, dV", "logarithm[None, :]) * mask", "logarithm[None, :])"),
            ("delta forgotten in dK", "(d_weights - along[None, :])", "d_weights"),
            ("diagonal not masked in dQ", "or start >= diagonal", "or start > diagonal"),
            ("diagonal not masked in dK, dV", "or start < diagonal", "or start < low"),
            (
                "documents forgotten in dK, dV",
                "row[None, :] <= last_query",
                "row[None, :] < length + last_query",
            ),
            ("one query too few in dK, dV", "<= last_query", "< last_query"),
            ("no key sees its query in dK, dV", "[:, None] <= row", "[:, None] < row"),
            ("last query of another key", "tl.minimum(start + COLUMNS, length) - 1", "start"),
            ("one head of the group", "begin + GROUP)", "begin + 1)"),
            ("masked heads are computed", "tl.where(mask == 0.0, high, low), high", "low, high"),
            ("values of wide heads forgotten", "HEAD_DIM, False, True", "HEAD_DIM, False, False"),
            ("partial sums of one row", " + block) * heads", ") * heads"),
        )
    ),
    Mutant("rms_norm", "forward: another column's mask", "mask + column,", "mask + column * 0,"),
    Mutant(
        "rms_norm", "backward: another column's mask", "mask + column,", "mask + column * 0,", 1
    ),
    Mutant("rms_norm", "forward: one row too many", "(row < rows)[:", "(row < rows + 1)[:"),
    Mutant("rms_norm", "no bound on the last rows", "root, mask=row < rows)", "root)"),
    Mutant("rms_norm", "dropped accumulation", "sums += outer", "sums = outer"),
    Mutant("rms_norm", "eps forgotten", "weight + eps", "weight"),
    Mutant("rms_norm", "backward: scale forgotten", "* tl.load(scale)", "* 1.0", 1),
    Mutant("rms_norm", "wrong sign in the gradient", "inner - normalised", "inner + normalised"),
    Mutant("rms_norm", "programs share a partial sum", ") * width + column\n", ") * 0 + column\n"),
    Mutant("swiglu", "wrong derivative", "values - activated", "values - sigmoid"),
    Mutant("swiglu", "dropped accumulation", "sums += outer", "sums = outer"),
    Mutant("swiglu", "mask gradient times the mask", "sums += outer", "sums += outer * scale"),
    Mutant("swiglu", "mask of the first block", "mask + column,", "mask + tl.arange(0, COLUMNS),"),
    Mutant("swiglu", "stride of the other input", "start * up_stride", "start * gate_stride"),
    Mutant("swiglu", "backward: wrong factor", "(outer * activated).to", "(outer * values).to"),
    Mutant("swiglu", "backward: last step left out", "in range(steps)", "in range(steps - 1)"),
    Mutant("rope", "wrong sign", "first * cosine - second", "first * cosine + second"),
    Mutant("rope", "inverse forgotten", "sine = -sine", "sine = sine"),
    Mutant("rope", "one channel too many", "present & (channel <", "present & (channel <="),
    Mutant("rope", "other channels kept", "kept = 2 * half", "kept = half"),
    Mutant("rope", "the keys have other heads", "heads = key_heads", "heads = heads"),
    Mutant("rope", "heads of the first block", "(block * BLOCK_HEADS", "(block * 0"),
    Mutant("cross_entropy", "row: another target", "column == target", "column == 0"),
    Mutant("cross_entropy", "walk: another target", "column == target", "column == 0", 1),
    Mutant("cross_entropy", "row: one column too many", "column < classes", "column <= classes"),
    Mutant("cross_entropy", "sum not rescaled", "total * faded +", "total +"),
    Mutant(
        "cross_entropy",
        "greatest value of the tile",
        "tl.maximum(top, tl.max(values, 0))",
        "tl.max(values, 0)",
    ),
    Mutant("cross_entropy", "second walk: first step left out", "steps - 1 - step", "steps - step"),
    Mutant("cross_entropy", "distance not rescaled", "distance * faded", "distance"),
    Mutant("cross_entropy", "stride of the other input", "* taught_stride", "* stride"),
    Mutant("cross_entropy", "gradient not cooled", "(values - top) * cooling", "(values - top)"),
    Mutant("cross_entropy", "wrong power", "share * temperature", "share * cooling"),
    Mutant("cross_entropy", "share forgotten", "weight * (1.0 - share)", "weight", 1),
    Mutant("cross_entropy", "small beside large", "(top - chosen)", "top - chosen"),
    Mutant(
        "cross_entropy", "loss of an ignored token", "weight == 0, 0.0, loss", "False, 0.0, loss"
    ),
    Mutant("gather_scale", "forward: wrong mask index", "row_scale + row", "row_scale + i"),
    Mutant("gather_scale", "what is left out is read", "place >= 0", "index < size"),
    Mutant("gather_scale", "dropped accumulation", "sums += product", "sums = product"),
    Mutant("gather_scale", "row mask forgotten", "+= product * by_row", "+= product"),
    Mutant("gather_scale", "column mask forgotten", "product * by_column, 1", "product, 1"),
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
