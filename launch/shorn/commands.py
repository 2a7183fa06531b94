"""The commands behind `shorn`: where each is, its options, and whether it runs on ranks."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Command:
    """One command."""

    module: str
    """What `python -m` runs; its `main` takes the arguments."""
    config: str
    """Its config dataclass, as module:class."""
    summary: str
    on_ranks: bool = False
    """Whether several processes, one per GPU, share the work."""

    def load_config(self) -> type:
        """The config dataclass."""
        module, _, name = self.config.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        return found


COMMANDS = {
    "tokenize": Command(
        "data.tokenize",
        "data.tokenize_config:TokenizeConfig",
        "text, or conversations, to token shards per domain",
    ),
    "shear": Command(
        "pruner.shear", "pruner.config:ShearConfig", "prune a model to a named shape", True
    ),
    "shorten": Command(
        "pruner.shorten.__main__",
        "pruner.shorten.config:ShortenConfig",
        "remove whole blocks or layers by importance",
        True,
    ),
    "cpt": Command(
        "launch.cpt", "launch.cpt:CptConfig", "continue the pre-training of a model", True
    ),
    "finetune": Command(
        "launch.finetune",
        "launch.finetune:FinetuneConfig",
        "heal or tune: adapters, last blocks, or all",
        True,
    ),
    "evaluate": Command(
        "launch.evaluate.__main__",
        "launch.evaluate.config:EvaluateConfig",
        "held-out loss, perplexity, accuracy on tasks",
        True,
    ),
    "latency": Command(
        "launch.latency.__main__",
        "launch.latency.config:LatencyConfig",
        "time how models generate",
    ),
    "export": Command(
        "launch.export.__main__",
        "launch.export.config:ExportConfig",
        "GGUF files for llama.cpp, compared with the model",
    ),
    "report": Command(
        "launch.report.__main__",
        "launch.report.config:ReportConfig",
        "one HTML page about runs",
    ),
    "compare": Command(
        "launch.compare.__main__",
        "launch.compare.config:CompareConfig",
        "pruning methods at equal tokens",
    ),
    "demo": Command(
        "launch.demo.__main__",
        "launch.demo.config:DemoConfig",
        "all of it on a 135M model and two CPU cores",
    ),
    "bench-kernels": Command(
        "launch.bench_kernels.__main__",
        "launch.bench_kernels.config:BenchKernelsConfig",
        "time the kernels",
    ),
    "bench-shear": Command(
        "launch.bench_shear.__main__",
        "launch.bench_shear.config:BenchShearConfig",
        "time shearing steps against plain training",
    ),
    "bench-scoring": Command(
        "launch.bench_scoring.__main__",
        "launch.bench_scoring.config:BenchScoringConfig",
        "time the scoring of blocks against the naive loop",
    ),
}
