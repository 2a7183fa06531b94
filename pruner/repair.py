"""The stage behind the cut: the saved model refitted, and the better of the two kept."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import replace_folder
from data.log import logger
from data.progress import Progress
from pruner.config import RefitConfig
from pruner.extract import Extraction
from pruner.importance import calibration_batches
from pruner.refit import refit
from trainer.callbacks.evaluate import EvaluateCallback
from trainer.loop import Trainer
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.hf import load_config
from trainer.models.sources import weights_fingerprint
from trainer.parallel import compute_dtype
from trainer.run import build_model, pretrained
from trainer.saving import full_tensors, save_tensors_of

FOLDER = "refit"
"""Folder of the blocks that are refitted already, in the output folder."""
REFITTED = "model.refitted"
"""Name of the refitted model until it has been compared."""


def repair(
    trainer: Trainer,
    extraction: Extraction,
    config: RefitConfig,
    plain: Path,
    *,
    source: Path,
    rotation: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Refits the model saved in `plain`, which is replaced where the result is better on held-out
    sequences; what the report says of it. Collective.

    Args:
        trainer: holds the source's weights, untrained, and the data.
        extraction: how `plain` was cut from them.
        config: resolved.
        plain: folder of the cut model.
        source: Hugging Face folder that tokenizer and companions come from.
        rotation: the basis in which hidden dimensions are kept; None: the source's own.
        dtype: of the saved weights.

    Raises InputError on every rank when a file cannot be written. Interrupted, it goes on from the
    blocks it has refitted.
    """
    context, output = trainer.context, plain.parent
    ids, held_out = sequences(trainer, config)
    told = {"sequences": len(ids), "tokens": ids.numel(), "ridge": config.refit_ridge}
    if not len(held_out):
        logger.warning("not refitted: the data has too few sequences to hold any out")
        return told | {"held_out_sequences": 0, "before": None, "after": None, "kept": False}
    before = _loss(_load(plain, trainer), held_out, trainer)
    compute = compute_dtype(trainer.config.precision, context.device)
    folder = output / FOLDER / _key(extraction, ids, config, compute, source, rotation)
    refitted = output / REFITTED
    pairs = refit(
        extraction,
        full_tensors(trainer.model),
        ids[context.rank :: context.world],
        ridge=config.refit_ridge,
        batch=trainer.config.micro_batch,
        context=context,
        dtype=compute,
        kept=folder,
    )
    shown = _shown(pairs, extraction)
    save_tensors_of(shown, extraction.config, context, refitted, source, dtype)
    model = _load(refitted, trainer)
    after = _loss(model, held_out, trainer)
    better = after < before
    if better:
        for callback in trainer.callbacks:
            if isinstance(callback, EvaluateCallback):
                callback.measure(trainer, model)
    context.raise_on_any_rank(lambda: _settle(refitted, plain, better) if context.is_main else None)
    verdict = "kept" if better else "not better: the weights stay as they were cut"
    losses = f"held-out loss {before:.4f} -> {after:.4f}"
    logger.info(f"refitted on {len(ids)} sequences; {losses}: {verdict}")
    told |= {"held_out_sequences": len(held_out), "before": before, "after": after}
    return told | {"kept": better}


def sequences(trainer: Trainer, config: RefitConfig) -> tuple[Tensor, Tensor]:
    """Sequences [n, S] that training would draw next, and held-out ones [m, S] behind them.

    So what the weights are refitted on is what they are then trained on, in the mixture's own
    proportions. A sequence comes once; where the data has too few, at most a quarter is held out.
    """
    wanted = config.refit_sequences + config.refit_held_out
    ids = torch.from_numpy(trainer.stream.ahead(wanted))
    share = config.refit_held_out if len(ids) == wanted else len(ids) // 4
    cut = len(ids) - min(config.refit_held_out, share)
    return ids[:cut], ids[cut:]


def _key(
    extraction: Extraction,
    ids: Tensor,
    config: RefitConfig,
    dtype: torch.dtype,
    source: Path,
    rotation: Tensor | None,
) -> str:
    """Tells refits apart: of another model in `source`, of other units, in another basis, on other
    sequences, with another ridge or precision."""
    digest = hashlib.blake2b(digest_size=8)
    held = extraction.masks.hold_scale
    digest.update(f"{weights_fingerprint(source)} {extraction.source.key} {held}".encode())
    if rotation is not None:
        digest.update(rotation.float().numpy().tobytes())
    for name, mask in sorted(extraction.masks.tensors().items()):
        digest.update(name.encode() + mask.float().numpy().tobytes())
    digest.update(ids.numpy().tobytes() + f"{config.refit_ridge} {dtype}".encode())
    return digest.hexdigest()


def _shown(
    pairs: Iterable[tuple[str, Tensor]], extraction: Extraction
) -> Iterator[tuple[str, Tensor]]:
    """`pairs` with the progress over the kept blocks."""
    prefix = f"{extraction.names.blocks}."
    done: set[str] = set()
    with Progress("refit", total=len(extraction.blocks), unit="block") as bar:
        for name, tensor in pairs:
            number = name.removeprefix(prefix).partition(".")[0]
            if name.startswith(prefix) and number not in done:
                done.add(number)
                bar.update(1)
            yield name, tensor


def _load(folder: Path, trainer: Trainer) -> CausalLM:
    """The model saved in `folder`, sharded, to be measured."""
    load = pretrained(folder)
    model = build_model(
        load_config(folder), trainer.config, trainer.context, load=load, frozen=True
    )
    return model.eval()


@torch.no_grad()
def _loss(model: CausalLM, held_out: Tensor, trainer: Trainer) -> float:
    """Mean token loss in nats; collective."""
    context, config = trainer.context, trainer.config
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    for weights, ids in calibration_batches(held_out, context, config.micro_batch, "measure"):
        targets, valid = next_token_targets(ids)
        counted = valid * weights[:, None].to(torch.float32)
        output = model(ids, targets=targets, weights=counted)
        sums += torch.stack([output.loss.double(), counted.sum().double()])
    total, tokens = context.all_reduce_sum(sums).tolist()
    return float(total / tokens)


def _settle(refitted: Path, plain: Path, better: bool) -> None:
    """Puts the better model in the place of `plain` and removes the rest."""
    if better:
        replace_folder(refitted, plain)
    else:
        shutil.rmtree(refitted, ignore_errors=True)
