"""What `python -m launch.evaluate` does: checks, measurement, JSON."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import InputError, naming
from data.files import require_distinct, require_writable, write_copy
from data.formats import Format, compression_of, format_of
from data.log import logger
from data.manifest import TRAIN
from data.places import odd_name
from data.progress import Progress
from data.reader import TokenReader
from data.records import read_text
from data.tokenizers import holds_tokenizer, load_tokenizer
from launch.evaluate.config import EvaluateConfig
from launch.evaluate.document import (
    DocumentPerplexity,
    document_perplexity,
    resolve_bos,
    scored_rows,
)
from launch.evaluate.tables import print_results
from launch.evaluate.tasks import Tasks
from pruner.latency import decode_timer
from pruner.timing import too_busy
from trainer import parallel
from trainer.agreement import SAME_FILES, require_same
from trainer.evaluate import evaluate, overall, report
from trainer.inputs import check_tokenizer
from trainer.memory import total_memory
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, load_model
from trainer.models.sources import resolve_model, weights_fingerprint
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model, opened and checked; no weights yet."""

    name: str
    """As the user wrote it."""
    path: Path
    shape: ModelConfig
    document: Document | None


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print on rank 0, and return what --json writes.

    Everything that can be refused without the weights is refused before they are read.
    """
    require_distinct({"--text": config.text, "--json": config.json})
    require_writable(config.json, "--json")
    context = parallel.init(threads=config.threads)
    text = _shared_document(config, context)
    reader = _open_tokens(config) if config.data is not None else None
    tasks = Tasks(config) if config.tasks else None
    kernels = choose_kernels(config.kernels, context)
    with context.rank_zero_first():
        paths = [resolve_model(model) for model in config.model]
    # Configs first: transformers, which reads tokenizers, then knows models of uneven blocks.
    shapes = [load_config(path) for path in paths]
    if reader is not None:
        _require_one_tokenizer(config, paths)
    candidates = []
    for name, path, shape in zip(config.model, paths, shapes, strict=True):
        _check_shape(config, shape, reader)
        if reader is not None:
            check_tokenizer(reader, shape, path, str(config.data))
        document = _tokenize(config, path, shape, text) if text is not None else None
        candidates.append(Candidate(name, path, shape, document))
    _require_same_inputs(candidates, reader, tasks, context)
    dtype = parallel.compute_dtype(config.precision, context.device)
    if config.speed:
        _require_memory(candidates, context, dtype)
    if tasks is not None:
        tasks.prepare([one.path for one in candidates], dtype, context)
    logger.info(kernels)
    results = [_measure(config, one, reader, tasks, context, dtype) for one in candidates]
    busy = None
    if config.speed and context.is_main:
        busy = _time(candidates, results, context, dtype)
    context.barrier()
    if context.is_main:
        _warn_of_damage(candidates, results)
    whole = {"models": results, "busy": busy} if len(results) > 1 else results[0]
    if context.is_main:
        # First, for whoever reads what is printed may not read all of it.
        write_copy(config.json, whole)
        print_results(config.model, results, busy)
    return whole


def _measure(
    config: EvaluateConfig,
    candidate: Candidate,
    reader: TokenReader | None,
    tasks: Tasks | None,
    context: parallel.DistributedContext,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Losses and accuracy of one model; its weights are gone afterwards."""
    result: dict[str, Any] = {
        "model": str(candidate.path),
        "weights": weights_fingerprint(candidate.path),
        "parameters": candidate.shape.num_parameters(),
        "non_embedding_parameters": candidate.shape.num_parameters(embeddings=False),
        "precision": str(dtype).removeprefix("torch."),
    }
    document = candidate.document
    waiting = tasks is not None and not tasks.are_finished(candidate.path, dtype, context)
    model = None
    if reader is not None or document is not None or waiting:
        model = load_model(candidate.path, context.device, dtype)
    if reader is not None and model is not None:
        result |= _held_out(config, candidate, model, reader, context)
    if document is not None and model is not None and context.is_main:
        score = _score(config, model, document, context)
        result["text"] = {"file": config.text, "bytes": document.text_bytes, **score.to_dict()}
    if tasks is not None:
        result |= tasks.measure(candidate.name, candidate.path, model, dtype, context)
    return result


def _warn_of_damage(candidates: list[Candidate], results: list[dict[str, Any]]) -> None:
    for one, result in zip(candidates, results, strict=True):
        losses = [domain["loss"] for domain in result.get("domains", {}).values()]
        losses += [result["text"]["nll"]] if "text" in result else []
        tasks = result.get("tasks", {}).values()
        losses += [math.nan for row in tasks if row[row["metric"]] is None]
        if not all(math.isfinite(loss) for loss in losses):
            other = (
                ""
                if result["precision"] == "float32"
                else (f", or {result['precision']} does not suit them: try --precision fp32")
            )
            logger.warning(f"the loss of {one.name} is not finite: its weights are damaged{other}")


def _require_memory(
    candidates: list[Candidate], context: parallel.DistributedContext, dtype: torch.dtype
) -> None:
    """Raises InputError where the models cannot take turns at decoding."""
    size = sum(one.shape.num_parameters() for one in candidates) * dtype.itemsize
    limit = total_memory(context.device) // 2
    if size > limit:
        raise InputError(
            f"--speed: the models together hold {size / 1e9:.1f} GB, more than half of this "
            f"device's memory ({limit / 1e9:.1f} GB): leave it out, or name fewer models"
        )


def _time(
    candidates: list[Candidate],
    results: list[dict[str, Any]],
    context: parallel.DistributedContext,
    dtype: torch.dtype,
) -> str | None:
    """Adds "decoding" to every result; returns why the times cannot be believed, if so."""
    timings = decode_timer(context.device, dtype)([one.shape for one in candidates])
    for result, timing in zip(results, timings, strict=True):
        result["decoding"] = timing.to_json() | {"threads": torch.get_num_threads()}
    names = [f"{one.name} (model {index})" for index, one in enumerate(candidates, 1)]
    shapes = [one.shape.key for one in candidates]
    return too_busy(dict(zip(names, timings, strict=True)), dict(zip(names, shapes, strict=True)))


def _shared_document(config: EvaluateConfig, context: parallel.DistributedContext) -> str | None:
    """The text of --text on every rank, None without one; rank 0 alone reads it, for a pipe can be
    read once. Raises InputError on every rank."""
    if config.text is None:
        return None
    path = Path(config.text)
    text = context.raise_on_any_rank(lambda: read_document(path) if context.is_main else None)
    shared: str = context.broadcast(text)
    return shared


def _require_same_inputs(
    candidates: list[Candidate],
    reader: TokenReader | None,
    tasks: Tasks | None,
    context: parallel.DistributedContext,
) -> None:
    """Raises InputError on every rank where the models, tokens or tasks of some are others."""
    if context.world == 1:
        return
    found = {
        f"model {number} of --model": weights_fingerprint(one.path)
        for number, one in enumerate(candidates, start=1)
    }
    if reader is not None:
        found["--data"] = reader.fingerprint
    if tasks is not None:
        found["version of lm-eval"] = str(tasks.harness.version)
        found["--task-files"] = str(tasks.harness.digest)
    require_same(found, context.gather, SAME_FILES)


def read_document(path: Path) -> str:
    """The text of --text. Raises InputError for a file that cannot be read, or is empty."""
    if path.is_file():
        _require_document(path)
    try:
        fix = odd_name(str(path), patterns=False) or "give a readable UTF-8 file"
        text = read_text(path, fix)
    except InputError as error:
        raise InputError(f"--text {error}") from None
    if not text:
        raise InputError(f"--text {path}: the file is empty; there is nothing to score")
    return text


def _require_one_tokenizer(config: EvaluateConfig, paths: list[Path]) -> None:
    """Raises InputError for models whose tokenizers differ: no tokens are those of both."""
    first: tuple[str, Any] | None = None
    for name, path in zip(config.model, paths, strict=True):
        if holds_tokenizer(path):
            probe = load_tokenizer(path).probe()
            if first is not None and probe != first[1]:
                raise InputError(
                    f"--data {config.data}: {first[0]} and {name} have different tokenizers, so "
                    "their losses per token cannot be compared; measure each in a call of its own, "
                    "or both on --text FILE, by bits per byte"
                )
            first = first or (name, probe)


def _open_tokens(config: EvaluateConfig) -> TokenReader:
    assert config.data is not None
    with naming("--data"):
        place, documents = Path(config.data), config.documents
        reader = TokenReader(place, config.seq_len, split=config.split, documents=documents)
    for domain, size in reader.sizes.items():
        # Damage shows here and not after the weights are loaded.
        reader.samples(domain, np.arange(min(config.sequences, size)))
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
    candidate: Candidate,
    model: CausalLM,
    reader: TokenReader,
    context: parallel.DistributedContext,
) -> dict[str, Any]:
    what = f"evaluate {candidate.name}"
    data = (reader, reader.domains, config.sequences, config.batch, context)
    losses = evaluate(model, *data, description=what)
    trained = reader.manifest.domains(TRAIN)
    return {
        "data": config.data,
        "split": config.split,
        "seq_len": config.seq_len,
        "documents": reader.documents,
        "sequences": {d: min(config.sequences, reader.sizes[d]) for d in reader.domains},
        "domains": report(losses),
        "missing": [domain for domain in trained if domain not in losses],
        "overall": report({"overall": overall(losses)})["overall"],
    }


def _require_document(path: Path) -> None:
    """Raises InputError for a file whose name says that it is no plain text."""
    if compression_of(path):
        raise InputError(f"--text {path}: is compressed; unpack it, and name what comes out")
    if format_of(path) is not Format.TEXT:
        raise InputError(
            f"--text {path}: is {format_of(path).value} by its name, and one document is scored as "
            "it stands, names and braces too: write the text of a record into a .txt file (or link "
            "to the file as .txt), or tokenize all records with `shorn tokenize` and give --data"
        )


def _tokenize(config: EvaluateConfig, path: Path, shape: ModelConfig, text: str) -> Document:
    """The text in tokens; raises InputError when window, stride, BOS or length do not fit it, or an
    id is beyond the model's rows."""
    if not holds_tokenizer(path):
        raise InputError(
            f"--text {config.text} is tokenized by the model's own tokenizer, and {path} holds "
            "none: copy tokenizer.json and tokenizer_config.json (or tokenizer.model) there from "
            "the model that it was made from, or measure it with --data"
        )
    tokenizer = load_tokenizer(path)
    bos = resolve_bos(config.bos, tokenizer.bos_id, tokenizer.adds_bos)
    ids = [int(token) for token in tokenizer.encode([text])[0]]
    with naming(f"--text {config.text}"):
        rows = scored_rows(ids, bos, tokenizer.bos_id, config.window, config.stride)
    largest = max(max(row) for row, _ in rows)
    if largest >= shape.vocab_size:
        raise InputError(
            f"--text {config.text}: the tokenizer of {path} gives id {largest}, for which the "
            f"model has no row: it has {shape.vocab_size}; fetch the tokenizer that it was trained "
            f"with, or remove the tokens that were added (or set as bos_token) in {path}"
        )
    return Document(ids, len(text.encode()), bos, tokenizer.bos_id)


def _score(
    config: EvaluateConfig,
    model: CausalLM,
    document: Document,
    context: parallel.DistributedContext,
) -> DocumentPerplexity:
    rows = scored_rows(document.ids, document.bos, document.bos_id, config.window, config.stride)
    targets = sum(len(row) - first for row, first in rows)
    with Progress("document", total=targets, unit="token") as bar:
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
