"""What `python -m launch.evaluate` does: checks, measurement, table and JSON."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.errors import InputError
from data.files import require_writable, write_copy
from data.log import logger
from data.progress import Progress
from data.reader import TokenReader
from data.tokenizers import load_tokenizer
from launch.evaluate.config import EvaluateConfig
from launch.evaluate.document import (
    DocumentPerplexity,
    document_perplexity,
    resolve_bos,
    scored_rows,
)
from trainer import parallel
from trainer.evaluate import DomainLoss, evaluate, overall, report
from trainer.inputs import check_tokenizer
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, load_model
from trainer.models.sources import resolve_model
from trainer.run import choose_kernels


@dataclass(frozen=True, slots=True)
class Document:
    """A text in the model's tokens."""

    ids: list[int]
    """Tokens of the whole text, no special ones."""
    text_bytes: int
    """UTF-8 length of the text."""
    bos: str
    """The resolved BOS rule: "no", "yes" or "every"."""
    bos_id: int | None


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print on rank 0, and return what --json writes.

    Everything that can be refused without the weights is refused before they are read.
    """
    require_writable(config.json, "--json")
    text = _read_text(Path(config.text)) if config.text is not None else None
    reader = _open_tokens(config) if config.data is not None else None
    context = parallel.init(threads=config.threads)
    kernels = choose_kernels(config.kernels, context)
    with context.rank_zero_first():
        path = resolve_model(config.model)
    shape = load_config(path)
    _check_shape(config, shape, reader)
    if reader is not None:
        check_tokenizer(reader, shape, path, str(config.data))
    document = _tokenize(config, path, text) if text is not None else None
    logger.info(kernels)
    dtype = parallel.compute_dtype(config.precision, context.device)
    model = load_model(path, context.device, dtype)
    result: dict[str, Any] = {
        "model": str(path),
        "parameters": shape.num_parameters(),
        "non_embedding_parameters": shape.num_parameters(embeddings=False),
        "precision": str(dtype).removeprefix("torch."),
    }
    if reader is not None:
        result |= _held_out(config, model, reader, context)
    if document is not None and context.is_main:
        score = _score(config, model, document, context)
        result["text"] = {"file": config.text, "bytes": document.text_bytes, **score.to_dict()}
    context.barrier()
    if context.is_main:
        _print(result)
        write_copy(config.json, result)
    return result


def _read_text(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path}: {error}; give a readable UTF-8 file") from error
    if not text:
        raise InputError(f"--text {path}: the file is empty; there is nothing to score")
    return text


def _open_tokens(config: EvaluateConfig) -> TokenReader:
    assert config.data is not None
    reader = TokenReader(Path(config.data), config.seq_len, split=config.split)
    for domain, size in reader.sizes.items():
        # Damage shows here and not after the weights are loaded.
        reader.read(domain, np.arange(min(config.sequences, size)))
    return reader


def _check_shape(config: EvaluateConfig, shape: ModelConfig, reader: TokenReader | None) -> None:
    limit = shape.max_position_embeddings
    lengths = {"--seq-len": config.seq_len if reader else 0, "--window": config.window}
    if config.text is None:
        del lengths["--window"]
    for flag, length in lengths.items():
        if length > limit:
            raise InputError(
                f"{flag} {length}: the model was made for at most {limit} positions; "
                f"use {flag} {limit} or less"
            )


def _held_out(
    config: EvaluateConfig,
    model: CausalLM,
    reader: TokenReader,
    context: parallel.DistributedContext,
) -> dict[str, Any]:
    losses: dict[str, DomainLoss] = {}
    with Progress("evaluate", total=len(reader.domains), unit="domain") as bar:
        for domain in reader.domains:
            losses |= evaluate(model, reader, [domain], config.sequences, config.batch, context)
            bar.update(1, domain=domain, loss=losses[domain].loss)
    return {
        "data": config.data,
        "split": config.split,
        "seq_len": config.seq_len,
        "sequences": {d: min(config.sequences, reader.sizes[d]) for d in reader.domains},
        "domains": report(losses),
        "overall": report({"overall": overall(losses)})["overall"],
    }


def _tokenize(config: EvaluateConfig, path: Path, text: str) -> Document:
    """The text in tokens; raises InputError when window, stride, BOS or length do not fit it."""
    tokenizer = load_tokenizer(path)
    bos = resolve_bos(config.bos, tokenizer.bos_id, tokenizer.adds_bos)
    ids = [int(token) for token in tokenizer.encode([text])[0]]
    scored_rows(ids, bos, tokenizer.bos_id, config.window, config.stride)
    return Document(ids, len(text.encode()), bos, tokenizer.bos_id)


def _score(
    config: EvaluateConfig,
    model: CausalLM,
    document: Document,
    context: parallel.DistributedContext,
) -> DocumentPerplexity:
    with Progress("document", total=len(document.ids), unit="token") as bar:
        return document_perplexity(
            model,
            document.ids,
            text_bytes=document.text_bytes,
            bos=document.bos,
            bos_id=document.bos_id,
            window=config.window,
            stride=config.stride,
            batch=config.batch,
            device=context.device,
            progress=bar.update,
        )


def _print(result: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{result['model']}: {result['parameters']:,} parameters, "
        f"{result['non_embedding_parameters']:,} without embeddings, {result['precision']}",
        highlight=False,
    )
    if "domains" in result:
        table = Table(title=f"{result['split']} tokens, {result['seq_len']} per sequence")
        table.add_column("domain")
        for name in ("loss", "perplexity", "target tokens"):
            table.add_column(name, justify="right")
        for name, row in (*result["domains"].items(), ("overall", result["overall"])):
            values = (f"{row['loss']:.4f}", f"{row['perplexity']:.3f}", f"{row['tokens']:,}")
            table.add_row(name, *values)
        console.print(table)
    if "text" in result:
        score = result["text"]
        stride = score["stride"] or f"none (windows of {score['window']} side by side)"
        table = Table(title=f"document {score['file']}", show_header=False)
        for name, value in (
            ("perplexity", f"{score['perplexity']:.4f}"),
            ("bits per byte", f"{score['bits_per_byte']:.4f}"),
            ("window", str(score["window"])),
            ("stride", str(stride)),
            ("BOS", BOS_WORDS[score["bos"]]),
            ("tokens", f"{score['tokens']:,}"),
            ("targets", f"{score['targets']:,}"),
        ):
            table.add_row(name, value)
        console.print(table)


BOS_WORDS = {
    "no": "none",
    "yes": "one in front of the document",
    "every": "one in front of every window",
}
