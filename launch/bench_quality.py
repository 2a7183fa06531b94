"""Held-out loss of a sheared model at a fixed budget of tokens: one row of the quality table.

The default protocol gives each domain its own documents for training and for measuring, in the
order of the input: 82k tokens in all, divided between shearing and continued pre-training.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data import cli
from data.errors import InputError
from data.sources import Document, Fields, find_files, iterate_documents
from launch.stages import ROOT, Stages, command, python

EXAMPLES = """
python -m launch.bench_quality --source models/SmolLM2-135M --input 'SlimPajama/train/**/*.zst'
python -m launch.bench_quality --source runs/demo/source --input 'text/*.zst' --seed 1 \\
    --output runs/quality-1 --json quality.json
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """Shear, continue pre-training and measure at a fixed number of tokens. Resumable."""

    source: str
    """Model to prune: a Hugging Face folder or hub id."""
    input: tuple[str, ...]
    """Documents with domains, as for data.tokenize."""
    output: str = "runs/quality"
    """Folder of everything this makes."""
    target: str = "layers=24,hidden=432,heads=6,kv-heads=2,ffn=1152"
    """Shape to prune to."""
    domain_weights: str = "c4=0.6,stackexchange=0.25,github=0.15"
    """Domains and their share of the training tokens; documents of others are left out."""
    held_out_documents: int = 60
    """First documents of each domain, kept for measuring."""
    train_documents: int = 340
    """Documents of each domain after those, for training."""
    sequences: int = 24
    """Held-out sequences measured per domain."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch: int = 8
    """Sequences per step."""
    shear_steps: int = 16
    """Steps of mask learning."""
    cpt_steps: int = 24
    """Steps of continued pre-training."""
    shear_lr: float = 3e-4
    """Peak learning rate while shearing."""
    cpt_lr: float = 6e-4
    """Peak learning rate of continued pre-training."""
    mixture: str = "fixed"
    """fixed keeps the domain weights; dynamic follows excess loss."""
    precision: str = "bf16"
    """Compute precision."""
    seed: int = 0
    """Seed of data order and masks."""
    shear_flags: str = ""
    """Further flags of pruner.shear, "--mask-lr 0.1 --mask-noise 0"."""
    json: str | None = None
    """Write the result to this file."""


def main() -> None:
    config = cli.parse(QualityConfig, section="bench_quality", examples=EXAMPLES)
    result = measure(config)
    print(json.dumps(result, indent=1))
    if config.json is not None:
        Path(config.json).write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def measure(config: QualityConfig) -> dict[str, object]:
    """Runs the stages that are not finished and returns the losses per domain."""
    output = Path(config.output)
    stages = Stages(output, number=4)
    text, tokens, shear, cpt = (output / name for name in ("text", "tokens", "shear", "cpt"))
    domains = [part.split("=")[0] for part in config.domain_weights.split(",")]
    documents = (config.held_out_documents, config.train_documents)
    stages.run(
        "text",
        settings={"input": config.input, "domains": domains, "documents": documents},
        folder=text,
        action=lambda: split_documents(config.input, domains, *documents, text),
    )
    stages.run(
        "tokens",
        settings={"seq_len": config.seq_len, "source": config.source},
        after=("text",),
        folder=tokens,
        action=lambda: _tokenize(config, text, tokens),
    )
    flags = _training_flags(config, tokens / "train")
    shear_words = [
        *(python(), "-m", "pruner.shear", "--source", config.source, "--target", config.target),
        *("--output", shear, "--steps", config.shear_steps, "--lr", config.shear_lr, *flags),
        *("--no-activation-checkpointing", *config.shear_flags.split()),
    ]
    cpt_words = [
        *(python(), ROOT / "launch" / "cpt.py", "--model", shear, "--output", cpt),
        *("--steps", config.cpt_steps, "--lr", config.cpt_lr, *flags),
    ]
    stages.run(
        "shear",
        settings={"words": [str(word) for word in shear_words]},
        after=("tokens",),
        folder=shear,
        action=lambda: command(shear_words, makes=shear / "shear.json"),
    )
    stages.run(
        "cpt",
        settings={"words": [str(word) for word in cpt_words]},
        after=("shear",),
        folder=cpt,
        action=lambda: command(cpt_words, makes=cpt / "cpt.json"),
    )
    models: dict[str, str | Path]
    models = {"source": config.source, "sheared": shear, "sheared + CPT": cpt}
    budget = (config.shear_steps + config.cpt_steps) * config.batch * config.seq_len
    losses = {name: _evaluate(config, model, output) for name, model in models.items()}
    return {"target": config.target, "tokens": budget, "seed": config.seed, "held_out": losses}


def split_documents(
    patterns: Iterable[str], domains: list[str], held_out: int, train: int, folder: Path
) -> None:
    """Writes train.jsonl.zst and held_out.jsonl.zst: the first `held_out` documents of each domain,
    and the `train` that follow them.

    Raises InputError when a domain has too few documents to measure and train on.
    """
    found: dict[str, list[Document]] = defaultdict(list)
    for path in find_files(list(patterns)):
        for document in iterate_documents(path, Fields()):
            if len(found[document.domain]) < held_out + train:
                found[document.domain].append(document)
    for domain in domains:
        if len(found[domain]) <= held_out:
            raise InputError(
                f"domain {domain!r} has {len(found[domain])} documents and --held-out-documents is "
                f"{held_out}, which leaves none to train on; the input has {sorted(found)}"
            )
    for name, part in {"held_out": slice(held_out), "train": slice(held_out, None)}.items():
        chosen = itertools.chain.from_iterable(found[domain][part] for domain in domains)
        with pa.output_stream(str(folder / f"{name}.jsonl.zst"), compression="zstd") as stream:
            for document in chosen:
                record = {"text": document.text, "meta": {"domain": document.domain}}
                stream.write(json.dumps(record).encode() + b"\n")


def _tokenize(config: QualityConfig, text: Path, tokens: Path) -> None:
    for name in ("train", "held_out"):
        words: list[object] = [
            python(),
            "-m",
            "data.tokenize",
            "--input",
            text / f"{name}.jsonl.zst",
        ]
        words += ["--tokenizer", config.source, "--output", tokens / name]
        words += ["--seq-len", config.seq_len, "--domain-field", "meta.domain", "--held-out", 0]
        command(words, makes=tokens / name / "manifest.json")


def _training_flags(config: QualityConfig, data: Path) -> list[object]:
    return [
        *("--data", data, "--seq-len", config.seq_len, "--global-batch", config.batch),
        *("--micro-batch", config.batch, "--warmup-ratio", 0.1, "--precision", config.precision),
        *("--mixture", config.mixture, "--domain-weights", config.domain_weights),
        *("--eval-sequences", 0, "--seed", config.seed),
    ]


def _evaluate(config: QualityConfig, model: str | Path, output: Path) -> dict[str, float]:
    result = output / "evaluation.json"
    words: list[object] = [python(), "-m", "launch.evaluate", "--model", model, "--split", "train"]
    words += ["--data", output / "tokens" / "held_out", "--seq-len", config.seq_len]
    words += ["--sequences", config.sequences, "--precision", config.precision, "--json", result]
    result.unlink(missing_ok=True)
    command(words, makes=result)
    domains = json.loads(result.read_text("utf-8"))["domains"]
    return {name: round(measured["loss"], 4) for name, measured in domains.items()}


if __name__ == "__main__":
    cli.run(main)
