"""What `python -m launch.bench_quality` does: its stages as commands, and its documents."""

import itertools
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from data.errors import InputError
from data.sources import Document, Fields, find_files, iterate_documents
from launch.stages import ROOT, Stages, command, python
from trainer.files import write_report

if TYPE_CHECKING:
    from launch.bench_quality import QualityConfig


def measure(config: "QualityConfig") -> dict[str, object]:
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
    runs = (("shear", "tokens", shear, shear_words), ("cpt", "shear", cpt, cpt_words))
    for name, before, folder, words in runs:
        stages.run(
            name,
            settings={"words": [str(word) for word in words]},
            after=(before,),
            folder=folder,
            action=partial(_command, config, words, folder / f"{name}.json"),
        )
    models: dict[str, str | Path]
    models = {"source": config.source, "sheared": shear, "sheared + CPT": cpt}
    budget = (config.shear_steps + config.cpt_steps) * config.batch * config.seq_len
    losses = {name: _evaluate(config, model, output) for name, model in models.items()}
    result = {"target": config.target, "tokens": budget, "seed": config.seed, "held_out": losses}
    if config.json is not None:
        write_report(Path(config.json), result)
    return result


def _command(config: "QualityConfig", words: list[object], makes: Path) -> None:
    """Runs a stage's command without the user's own settings, which would change the numbers."""
    command(words, makes=makes, settings_file=Path(config.output) / "shorn.toml")


def split_documents(
    patterns: Iterable[str], domains: list[str], held_out: int, train: int, folder: Path
) -> None:
    """Writes train.jsonl.zst and held_out.jsonl.zst: the first `held_out` documents of each domain,
    and the `train` that follow them.

    Reads no further than the last document it needs. Raises InputError when a domain has too few
    documents to measure and train on.
    """
    wanted = held_out + train
    found: dict[str, list[Document]] = {domain: [] for domain in domains}
    others: set[str] = set()
    for document in _documents(patterns):
        kept = found.get(document.domain)
        if kept is None:
            others.add(document.domain)
        elif len(kept) < wanted:
            kept.append(document)
            if all(len(part) == wanted for part in found.values()):
                break
    for domain in domains:
        if len(found[domain]) <= held_out:
            known = sorted(others | {name for name, part in found.items() if part})
            raise InputError(
                f"domain {domain!r} has {len(found[domain])} documents and --held-out-documents is "
                f"{held_out}, which leaves none to train on; the input has {known}"
            )
    for name, part in {"held_out": slice(held_out), "train": slice(held_out, None)}.items():
        chosen = itertools.chain.from_iterable(found[domain][part] for domain in domains)
        with pa.output_stream(str(folder / f"{name}.jsonl.zst"), compression="zstd") as stream:
            for document in chosen:
                record = {"text": document.text, "meta": {"domain": document.domain}}
                stream.write(json.dumps(record).encode() + b"\n")


def _documents(patterns: Iterable[str]) -> Iterator[Document]:
    for path in find_files(list(patterns)):
        yield from iterate_documents(path, Fields())


def _tokenize(config: "QualityConfig", text: Path, tokens: Path) -> None:
    for name in ("train", "held_out"):
        words: list[object] = [python(), "-m", "data.tokenize", "--tokenizer", config.source]
        words += ["--input", text / f"{name}.jsonl.zst", "--output", tokens / name]
        words += ["--seq-len", config.seq_len, "--domain-field", "meta.domain", "--held-out", 0]
        _command(config, words, tokens / name / "manifest.json")


def _training_flags(config: "QualityConfig", data: Path) -> list[object]:
    return [
        *("--data", data, "--seq-len", config.seq_len, "--global-batch", config.batch),
        *("--micro-batch", config.batch, "--warmup-ratio", 0.1, "--precision", config.precision),
        *("--mixture", config.mixture, "--domain-weights", config.domain_weights),
        *("--eval-sequences", 0, "--seed", config.seed),
    ]


def _evaluate(config: "QualityConfig", model: str | Path, output: Path) -> dict[str, float]:
    result = output / "evaluation.json"
    words: list[object] = [python(), "-m", "launch.evaluate", "--model", model, "--split", "train"]
    words += ["--data", output / "tokens" / "held_out", "--seq-len", config.seq_len]
    words += ["--sequences", config.sequences, "--precision", config.precision, "--json", result]
    result.unlink(missing_ok=True)
    _command(config, words, result)
    domains = json.loads(result.read_text("utf-8"))["domains"]
    return {name: round(measured["loss"], 4) for name, measured in domains.items()}
