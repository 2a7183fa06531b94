"""What `python -m launch.evaluate` does: checks, measurement, JSON."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import InputError, naming
from data.files import require_distinct, require_writable, write_copy
from data.log import logger
from data.manifest import TRAIN
from data.progress import Progress
from data.reader import TokenReader
from launch.evaluate.candidates import Candidate, open_candidates
from launch.evaluate.config import EvaluateConfig
from launch.evaluate.document import document_perplexity, scored_rows
from launch.evaluate.tables import print_results, texts_of
from launch.evaluate.tasks import Tasks
from launch.evaluate.texts import Document, shared_texts
from pruner.latency import decode_timer
from pruner.timing import too_busy
from trainer import parallel
from trainer.agreement import SAME_FILES, require_same
from trainer.evaluate import evaluate, overall, report
from trainer.memory import total_memory
from trainer.models.decoder import CausalLM
from trainer.run import choose_kernels


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print on rank 0, and return what --json writes.

    Everything that can be refused without the weights is refused before they are read.
    """
    for name in config.text:
        require_distinct({"--text": name, "--json": config.json})
    require_writable(config.json, "--json")
    context = parallel.init(threads=config.threads)
    texts = shared_texts(config.text, context)
    reader = _open_tokens(config) if config.data is not None else None
    tasks = Tasks(config) if config.tasks else None
    kernels = choose_kernels(config.kernels, context)
    candidates = open_candidates(config, reader, texts, context)
    _require_same_inputs(candidates, reader, tasks, context)
    dtype = parallel.compute_dtype(config.precision, context.device)
    if config.speed:
        _require_memory(candidates, context, dtype)
    if tasks is not None:
        tasks.prepare(candidates, dtype, context)
    logger.info(kernels)
    results = [_measure(config, one, reader, tasks, context, dtype) for one in candidates]
    busy = None
    if config.speed and context.is_main:
        busy = _time(candidates, results, context, dtype)
    context.barrier()
    if context.is_main:
        _warn_of_damage(candidates, results)
    several = len(results) > 1 or config.checkpoints is not None
    whole = {"models": results, "busy": busy} if several else results[0]
    if context.is_main:
        # First, for whoever reads what is printed may not read all of it.
        write_copy(config.json, whole)
        print_results([one.name for one in candidates], results, busy)
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
        "weights": candidate.weights,
        "parameters": candidate.shape.num_parameters(),
        "non_embedding_parameters": candidate.shape.num_parameters(embeddings=False),
        "precision": str(dtype).removeprefix("torch."),
    }
    if candidate.saved is not None:
        result |= {"step": candidate.saved.step, "tokens": candidate.saved.tokens}
    documents = candidate.documents
    waiting = tasks is not None and not tasks.are_finished(candidate, dtype, context)
    model = None
    if reader is not None or documents or waiting:
        model = context.raise_on_any_rank(lambda: candidate.load(context.device, dtype))
    if reader is not None and model is not None:
        result |= _held_out(config, candidate, model, reader, context)
    if documents and model is not None and context.is_main:
        scores = [_scored(config, model, document, context) for document in documents]
        if len(scores) == 1:
            result["text"] = scores[0]
        else:
            result["texts"] = {score["file"]: score for score in scores}
    if tasks is not None:
        result |= tasks.measure(candidate, model, dtype, context)
    return result


def _warn_of_damage(candidates: list[Candidate], results: list[dict[str, Any]]) -> None:
    for one, result in zip(candidates, results, strict=True):
        losses = [domain["loss"] for domain in result.get("domains", {}).values()]
        losses += [score["nll"] for score in texts_of(result).values()]
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


def _require_same_inputs(
    candidates: list[Candidate],
    reader: TokenReader | None,
    tasks: Tasks | None,
    context: parallel.DistributedContext,
) -> None:
    """Raises InputError on every rank where the models, tokens or tasks of some are others."""
    if context.world == 1:
        return
    found = {}
    for number, one in enumerate(candidates, start=1):
        of_run = one.saved is not None
        name = f"{one.name} of --checkpoints" if of_run else f"model {number} of --model"
        found[name] = one.weights
    if reader is not None:
        found["--data"] = reader.fingerprint
    if tasks is not None:
        found["version of lm-eval"] = str(tasks.harness.version)
        found["--task-files"] = str(tasks.harness.digest)
    require_same(found, context.gather, SAME_FILES)


def _open_tokens(config: EvaluateConfig) -> TokenReader:
    assert config.data is not None
    with naming("--data"):
        place, documents = Path(config.data), config.documents
        reader = TokenReader(place, config.seq_len, split=config.split, documents=documents)
    for domain, size in reader.sizes.items():
        # Damage shows here and not after the weights are loaded.
        reader.samples(domain, np.arange(min(config.sequences, size)))
    return reader


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


def _scored(
    config: EvaluateConfig,
    model: CausalLM,
    document: Document,
    context: parallel.DistributedContext,
) -> dict[str, Any]:
    """What the results say of a text."""
    rows = scored_rows(document.ids, document.bos, document.bos_id, config.window, config.stride)
    targets = sum(len(row) - first for row, first in rows)
    with Progress(Path(document.name).name, total=targets, unit="token") as bar:
        score = document_perplexity(
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
    found = {"file": document.name, "bytes": document.text_bytes, **score.to_dict()}
    # Tells these tokens from those that another tokenizer makes of the text.
    digest = hashlib.sha256(np.array(document.ids, "<i8").tobytes())
    found["tokens_sha256"] = digest.hexdigest()[:16]
    known = document.published
    if known is not None:
        found |= {"set": f"{known.repository}, {known.files}", "whole_windows": True}
    return found
