"""What is written is read again: tensor by tensor, by transformers and by llama.cpp."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import InputError
from data.log import logger
from data.tokenizers import PROBE_TEXT, load_tokenizer
from launch.export.architecture import notes_of, tensors_of
from launch.export.gguf_file import Plan, encoded, read_tensors, type_of
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM

LENGTH = 24
"""Tokens of the text whose predictions are compared."""
NEW_TOKENS = 16
"""Greedy tokens behind the text, at each of which probabilities are compared."""
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3")
"""Architectures whose GGUF files transformers loads."""
EXACT = {"f32": 1e-4, "bf16": 0.05, "f16": 0.05}
"""Largest difference of logits, over the largest logit, that rounding of weights explains."""
LIMITS = {"f32": 0.1, "bf16": 0.5, "f16": 0.1}
"""Largest difference of log-probabilities, in nats, that rounding of weights explains; llama.cpp
rounds activations and its cache as well."""
TOP = 8
"""Highest probabilities that are compared at each place."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the original says about a text."""

    ids: list[int]
    logits: np.ndarray
    """[tokens, vocabulary] fp32."""
    text: str
    text_ids: list[int]
    """The tokens of `text`."""


def reference_of(model: CausalLM, folder: Path) -> Reference:
    """Predictions of `model` on the tokens of a text that tells tokenizers apart."""
    tokenizer = load_tokenizer(folder)
    text_ids = tokenizer.probe()
    ids = text_ids[:LENGTH]
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        ids = [tokenizer.bos_id, *ids][:LENGTH]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
    return Reference(ids, logits[0].float().numpy(), PROBE_TEXT, text_ids)


def compare_tensors(plan: Plan, path: Path, model: CausalLM) -> dict[str, Any]:
    """Reads all tensors at `path` again and compares them with the model's, which must be what the
    type keeps of them. Raises InputError where a tensor is not what was to be written."""
    from gguf import GGMLQuantizationType, quants

    found = _tensors(plan, path)
    largest, count = 0.0, 0
    for name, value in tensors_of(model):
        kind = type_of(name, value, plan.type)
        wanted = quants.dequantize(encoded(value, kind), GGMLQuantizationType[kind.upper()])
        stored_name, stored = next(found, ("nothing", np.zeros(0)))
        if stored_name != name or not np.array_equal(
            stored, wanted.reshape(value.shape), equal_nan=True
        ):
            raise InputError(_damaged(plan, path, f"{stored_name} where {name} was written"))
        plain = value.detach().float().numpy()
        scale = float(np.abs(plain).max(initial=0.0)) or 1.0
        largest = max(largest, float(np.abs(stored - plain).max(initial=0.0)) / scale)
        count += 1
    return {"tensors": count, "largest_rounding": largest}


def _tensors(plan: Plan, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        yield from read_tensors(path)
    # The library raises what a damaged file happens to make it raise.
    except Exception as error:
        raise InputError(_damaged(plan, path, f"what cannot be read ({error})")) from None


def _damaged(plan: Plan, path: Path, what: str) -> str:
    if path == plan.path:
        return f"{path}: holds {what}, or other values: delete it, and run the same command again"
    return (
        f"{plan.path}: came out with {what}, or with other values, and is not kept: the disk is "
        "full, or it or the memory is not sound; run the same command again"
    )


def _fate(plan: Plan, path: Path) -> str:
    """What becomes of a file that others read otherwise: one that was there before stays."""
    return "" if path == plan.path else "; the file is not kept"


def compare_transformers(
    plan: Plan, path: Path, reference: Reference, model: ModelConfig
) -> dict[str, Any] | None:
    """Predictions of plain transformers on the file; None where it cannot read such files: its
    reader knows no scaled rotary frequencies and no sliding window."""
    window = model.sliding_window or model.max_position_embeddings
    known = model.rope_scaling is None and window >= LENGTH
    if plan.architecture not in READ_BY_TRANSFORMERS or not known:
        return None
    if find_spec("accelerate") is None:
        return None
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    # Its bars would stand between our lines.
    logging.disable_progress_bar()
    settings = GgufConfig(gguf_file=path.name, dequantize=True)
    options: dict[str, Any] = {"quantization_config": settings, "dtype": torch.float32}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, **options
        ).eval()
    # Its reader of such files knows less than llama.cpp's, and raises what it happens to.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.info(f"note: {plan.path}: transformers does not load it ({reason})")
        return None
    with torch.no_grad():
        logits = loaded(torch.tensor([reference.ids])).logits[0].float().numpy()
    found = _distance(logits[:, : reference.logits.shape[1]], reference.logits)
    limit = EXACT.get(plan.type)
    if limit is not None and found["largest_difference"] > limit:
        raise InputError(
            f"{plan.path}: transformers reads a model from it whose logits are up to "
            f"{found['largest_difference']:.3g} of the largest away from the original's, more than "
            f"{plan.type} explains ({limit:g}){_fate(plan, path)}; please report it with the "
            "model's config.json"
        )
    return found


def _distance(logits: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    scale = float(np.abs(wanted).max()) or 1.0
    same = float((logits.argmax(axis=1) == wanted.argmax(axis=1)).mean())
    return {"largest_difference": float(np.abs(logits - wanted).max()) / scale, "same_top": same}


def compare_llama_cpp(
    plan: Plan, path: Path, reference: Reference, model: CausalLM, threads: int
) -> dict[str, Any] | None:
    """Tokens of a text, and probabilities along the original's greedy continuation, by llama.cpp;
    None where it is not installed.

    Raises InputError where it cannot load the file, splits the text otherwise, or where it finds
    other probabilities than a type without quantization explains.
    """
    if find_spec("xllamacpp") is None:
        return None
    from launch.export.llama_cpp import LlamaCpp

    runner = LlamaCpp(path, threads, plan.path)
    tokens = runner.tokenize(reference.text)
    if tokens != reference.text_ids:
        at = _first_difference(tokens, reference.text_ids)
        raise InputError(
            f"{plan.path}: llama.cpp splits a text into other tokens than the model's tokenizer, "
            f"from token {at} on ({tokens[at : at + 4]}, not {reference.text_ids[at : at + 4]}); "
            f"please report it with the model's tokenizer.json{_fate(plan, path)}"
        )
    ids, same, compared, apart = list(reference.ids), 0, 0, 0.0
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            own = model(torch.tensor([ids]))[0, -1].float().log_softmax(dim=-1)
        theirs = runner.next_token(ids, top=TOP)
        ids.append(int(own.argmax()))
        if theirs:
            compared += 1
            same += next(iter(theirs)) == ids[-1]
            apart = max(apart, *(abs(float(own[at]) - value) for at, value in theirs.items()))
    found: dict[str, Any] = {"text_tokens": len(tokens), "same_greedy": same, "of": compared}
    found["largest_difference_nats"] = apart
    alike = not notes_of(model.config) or model.config.family == "gpt_neox"
    if alike and apart > LIMITS.get(plan.type, math.inf):
        raise InputError(
            f"{plan.path}: llama.cpp's probabilities are up to {apart:.3g} nats from the "
            f"original's, more than {plan.type} explains ({LIMITS[plan.type]:g})"
            f"{_fate(plan, path)}; please report it with the model's config.json"
        )
    return found


def _first_difference(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((place for place, pair in pairs if pair[0] != pair[1]), shorter)
