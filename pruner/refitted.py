"""How far a pruned and refitted model's predictions are from its source's.

What a refit mends should not count against a cut, so searches compare cuts after it. Candidates are
masks on the loaded source; each is cut and refitted on the first sequences of a text and measured
on others, and none is ever built whole. What is measured is kept in a file, and a search that is
run again goes on from it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from data.errors import InputError
from pruner.config import ShearConfig
from pruner.extract import Extraction
from pruner.importance import measure
from pruner.kept_values import keep_values, read_values
from pruner.refit import Refit, carry
from pruner.rotation import measure_rotation, rotate
from pruner.shapes import Shape, shape_of
from pruner.units import indicator, to_masks, unit_kinds
from trainer.kernels.linear_cross_entropy import TeacherOutput, linear_distillation
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.layers import LayerNorm, RMSNorm
from trainer.models.masks import Masks
from trainer.parallel import DistributedContext, compute_dtype, reshard
from trainer.saving import full_tensors


class RefittedDivergence:
    """Mean Kullback-Leibler divergence, in nats per held-out token, of models that are cut from a
    source and refitted. Collective, the same on every rank.

    Args:
        model: the source, loaded.
        ids: [n, S], the sequences to refit on.
        held_out: [m, S], those to measure on, but no more than those refitted on.
        ridge: of a refit on all of them.
        batch: sequences per rank that are computed at once.
        dtype: what blocks compute in.
        path: the file of what is known.
    """

    def __init__(
        self,
        model: CausalLM,
        ids: Tensor,
        held_out: Tensor,
        context: DistributedContext,
        *,
        ridge: float,
        batch: int,
        dtype: torch.dtype,
        path: Path,
    ) -> None:
        self.model = model
        self.ids = ids
        self.held_out = held_out
        self.context = context
        self.ridge = ridge
        self.batch = batch
        self.dtype = dtype
        self.path = path
        self.known: dict[str, float] = read_values(path, {"*": float}, context)
        """By the name of the masks and the number of sequences."""

    def of(self, name: str, masks: Callable[[], Masks], number: int) -> float:
        """With the masks that `name` stands for, refitted on the first `number` of the sequences
        and measured on as many held-out ones, if there are; infinite where it is no number.

        Raises InputError on every rank where it cannot be kept.
        """
        key = f"{name} on {number}"
        if key not in self.known:
            self.known[key] = self._measure(masks(), number)
            finite = {text: value for text, value in self.known.items() if value < math.inf}
            keep_values(self.path, finite, self.context)
        return self.known[key]

    @torch.no_grad()
    def _measure(self, masks: Masks, number: int) -> float:
        context = self.context
        extraction = Extraction(self.model.config, masks)
        read = (self.ids[:number], self.held_out[:number])
        own = [ids[context.rank :: context.world] for ids in read]
        work = Refit(
            extraction,
            torch.cat(own),
            # The penalty of all of them: few sequences leave more to chance.
            ridge=self.ridge * len(self.ids) / number,
            batch=self.batch,
            context=context,
            held_out=len(own[1]),
        )
        outer = Outside(self.model.config)
        tensors = outer.note(full_tensors(self.model))
        pruned = Outside(extraction.config)
        for _ in pruned.note(carry(work, tensors, dtype=self.dtype)):
            pass
        sums = torch.zeros(2, dtype=torch.float64, device=context.device)
        for ids, streams in list(zip(work.parts, work.streams, strict=True))[work.fitted :]:
            states = [
                outside.states(stream.to(context.device))
                for outside, stream in ((outer, streams.source), (pruned, streams.pruned))
            ]
            targets, valid = next_token_targets(ids.to(context.device))
            teacher = TeacherOutput(states[0], outer.head(context.device), 1.0)
            _, _, divergence = linear_distillation(
                states[1],
                pruned.head(context.device),
                targets.flatten(),
                valid.flatten().float(),
                teacher,
            )
            sums += torch.stack([divergence.double().sum(), valid.double().sum()])
        total, tokens = context.all_reduce_sum(sums).tolist()
        return total / tokens if math.isfinite(total) else math.inf


def refitted_divergence(
    model: CausalLM, config: ShearConfig, ids: Tensor, context: DistributedContext, path: Path
) -> RefittedDivergence:
    """As the resolved `config` refits: on `ids` [n, S] but the last, which are held out. Raises
    InputError where there are too few."""
    refit = config.refit
    held_out = refit.refit_held_out
    if len(ids) < refit.refit_sequences + held_out:
        held_out = min(held_out, len(ids) // 4)
    cut = len(ids) - held_out
    if not held_out:
        raise InputError(
            f"--data {config.data}: {len(ids)} sequences in these proportions are too few to refit "
            "on and to compare by; use more text, or no search with refits (--propose rule, "
            "--layer-widths uniform; of blocks --search evolution)"
        )
    return RefittedDivergence(
        model,
        ids[:cut],
        ids[cut:],
        context,
        ridge=config.refit.refit_ridge,
        batch=config.train.micro_batch,
        dtype=compute_dtype(config.train.precision, context.device),
        path=path,
    )


def importance_of(
    model: CausalLM, config: ShearConfig, calibration: Tensor, context: DistributedContext
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Importance [rows, units] of the units of all kinds on `calibration` [m, S], by the measure of
    the resolved `config` (activations for one that does not measure all kinds at once); `model` is
    rotated before if `config` says so, by what comes second. Collective."""
    batch, masks = config.train.micro_batch, config.masks
    rotation = None
    if masks.basis == "principal":
        rotation = measure_rotation(model, calibration, context, batch)
        rotate(model, rotation)
    kind = "importance" if masks.init in (None, "flat", "second-order") else masks.init
    found = measure(kind, model, calibration, context, batch)
    reshard(model)
    return {name: values[0] for name, values in found.items()}, rotation


def cut_units(importance: dict[str, Tensor], target: Shape, source: Shape) -> dict[str, Tensor]:
    """The most important units, as many as `target` keeps: 1 for these, else 0, of each kind that
    it cuts; `importance` [rows, units] of each kind."""
    kinds = unit_kinds(target, source)
    return {name: indicator(importance[name], kind.target) for name, kind in kinds.items()}


def cut(source: ModelConfig, importance: dict[str, Tensor], target: Shape, held: bool) -> Masks:
    """Masks of `cut_units`; `held` as Masks.hold_scale."""
    shape = shape_of(source)
    return to_masks(cut_units(importance, target, shape), shape, hold_scale=held)


class Outside:
    """What of a model is outside its blocks, noted while its tensors go by."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.names = config.traits.names
        self.tensors: dict[str, Tensor] = {}

    def note(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same `tensors`."""
        for name, tensor in tensors:
            if not name.startswith(f"{self.names.blocks}."):
                self.tensors[name] = tensor
            yield name, tensor

    def head(self, device: torch.device) -> Tensor:
        """[V, d] fp32."""
        module = self.names.embedding if self.config.tie_embeddings else self.names.head
        return self.tensors[f"{module}.weight"].float().to(device)

    def states(self, stream: Tensor) -> Tensor:
        """Outputs of the final norm [B * S, d] fp32 for the stream [B, S, d] in front of it."""
        kind = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[self.config.traits.norm]
        norm: nn.Module = kind(self.config.hidden_size, self.config.norm_eps)
        prefix = f"{self.names.final_norm}."
        own = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        norm.load_state_dict(own)
        states: Tensor = norm.to(stream.device)(stream.float())
        return states.flatten(0, 1)
