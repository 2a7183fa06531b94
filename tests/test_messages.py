"""Messages may only advise options that exist, in the command that prints them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.cli import all_options
from data.tokenize_config import TokenizeConfig
from launch.bench_kernels.config import BenchKernelsConfig
from launch.bench_scoring.config import BenchScoringConfig
from launch.bench_shear.config import BenchShearConfig
from launch.compare.config import CompareConfig
from launch.demo.config import DemoConfig
from launch.evaluate.config import EvaluateConfig
from launch.export.config import ExportConfig
from launch.latency.config import LatencyConfig
from launch.report.config import ReportConfig
from pruner.config import ShearConfig
from pruner.shorten.config import ShortenConfig
from trainer.config import CptConfig
from trainer.finetune_config import FinetuneConfig

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("data", "trainer", "pruner", "launch")
CONFIGS = {
    "tokenize": TokenizeConfig,
    "shear": ShearConfig,
    "shorten": ShortenConfig,
    "cpt": CptConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "latency": LatencyConfig,
    "report": ReportConfig,
    "compare": CompareConfig,
    "demo": DemoConfig,
    "bench_kernels": BenchKernelsConfig,
    "bench_shear": BenchShearConfig,
    "bench_scoring": BenchScoringConfig,
}
OWN = {"--ranks", "--help", "--help-all", "--version", "--completion"}
FOREIGN = {
    *("--include", "--local-dir", "--revision", "--repo-type"),  # hf download
    *("--no-build-isolation", "--no-deps", "--dest"),  # pip
    *("--nproc_per_node", "--long", "--notest", "--merge"),  # torchrun, zstd, convmv, llama.cpp
    *("--porcelain", "--short", "--untracked-files", "--query-gpu", "--format", "--id"),
}
PRINTED_BY = {
    "data/tasks.py": "tokenize",
    "data/job.py": "tokenize",
    "data/sources.py": "tokenize",
    "data/streams.py": "tokenize",
    "data/domain_names.py": "tokenize",
    "data/token_report.py": "tokenize",
    "data/tokenizers.py": "tokenize",
    "data/chat": "tokenize",
    # It says how to make a folder that can be read.
    "data/reader.py": "tokenize cpt evaluate",
    "data/find.py": "tokenize compare",
    "data/mixture.py": "shear cpt finetune",
    "data/weight_history.py": "shear cpt finetune",
    "trainer/adapters.py": "finetune",
    "trainer/callbacks/": "shear cpt finetune",
    "trainer/checkpoint": "shear cpt finetune",
    "trainer/disk.py": "shear cpt finetune",
    "trainer/domains.py": "shear cpt finetune",
    "trainer/finetune": "finetune",
    "trainer/memory.py": "shear cpt finetune",
    "trainer/models/lora.py": "finetune",
    "trainer/scaling.py": "shear cpt finetune",
    "trainer/saving.py": "shear cpt finetune",
    "pruner/callback.py": "shear",
    "pruner/config.py": "shear",
    "pruner/measurements.py": "shear",
    "pruner/rotation.py": "shear",
    "pruner/sheared_llama.py": "shear",
    "pruner/shorten/": "shorten",
    # A method's flags are those of shearing and training.
    "launch/compare/": "compare shear cpt shorten",
    "launch/demo/config.py": "demo",
    "launch/evaluate/": "evaluate",
    # It names the options of shearing that give sizes which fit.
    "launch/export/": "export shear",
    # It names the command that writes the file of losses.
    "launch/latency/": "latency evaluate",
    "launch/report/page.py": "report",
    "launch/bench_kernels/": "bench_kernels",
    "launch/bench_shear/": "bench_shear",
    "launch/bench_scoring/": "bench_scoring",
}
"""Commands that print the errors and warnings of these files, all of which must know the option;
only one of them where several are named for what a user may pass on."""


def options(command: str) -> set[str]:
    flags = {option.flag for option in all_options(CONFIGS[command])}
    return flags | {f"--no-{flag[2:]}" for flag in flags}


def texts(path: Path, *, printed: bool) -> Iterator[tuple[int, str]]:
    """Lines and texts of a file that are no docstrings; `printed`: in errors and warnings only."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if re.search(r"(InputError|warning)$", ast.unparse(call.func))]
    for root in named if printed else [tree]:
        for node in ast.walk(root):
            if not isinstance(node, ast.Constant) or id(node) in docs:
                continue
            if isinstance(node.value, str):
                yield node.lineno, node.value


def named_options(path: Path, *, printed: bool = False) -> Iterator[tuple[int, str]]:
    for line, text in texts(path, printed=printed):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z](?![\w-])", text):
            yield line, flag


def test_every_option_in_a_text_exists() -> None:
    known = OWN | FOREIGN | set().union(*map(options, CONFIGS))
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [(path, *named) for path in files for named in named_options(path)]
    assert len(found) > 300
    wrong = [
        f"{path.relative_to(ROOT)}:{n}: {flag}" for path, n, flag in found if flag not in known
    ]
    assert not wrong


@pytest.mark.parametrize("place", PRINTED_BY)
def test_advice_names_options_of_the_command_that_gives_it(place: str) -> None:
    known = OWN | FOREIGN | set().union(*map(options, PRINTED_BY[place].split()))
    files = [path for path in ROOT.glob(f"{place}*") if path.suffix == ".py"]
    files += (ROOT / place).rglob("*.py") if place.endswith("/") else []
    assert files
    found = [(path.name, *named) for path in files for named in named_options(path, printed=True)]
    assert not [f"{name}:{line}: {flag}" for name, line, flag in found if flag not in known]
