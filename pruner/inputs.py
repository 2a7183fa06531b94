"""What the options of a pruning run name, opened and checked before any weight is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from data.hub import is_hub_id
from data.reader import TokenReader
from pruner.config import ShearConfig, resolve
from pruner.layer_widths import require_room_for_widths
from pruner.selection import Selection
from pruner.shapes import (
    Shape,
    config_of,
    parse_sizes,
    parse_target,
    require_even,
    shape_of,
)
from pruner.sheared_llama import require_reachable
from pruner.units import UnitKind, unit_kinds
from trainer.agreement import SAME_FILES, require_same
from trainer.distillation import check_teacher
from trainer.domains import DomainOptions, Domains, replayed, starting_domains
from trainer.inputs import find_model_with_data, open_data, warn_of_no_tokenizer
from trainer.models.config import ModelConfig
from trainer.models.export import require_loadable
from trainer.models.hf import check_weights, load_config
from trainer.models.sources import local_folder, resolve_model, weights_fingerprint
from trainer.output import require_apart
from trainer.parallel import DistributedContext


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything the options name, opened and checked; no weights yet."""

    config: ShearConfig
    """The options, resolved."""
    folder: Path
    """The source's Hugging Face folder."""
    model: ModelConfig
    source: Shape
    target: Shape
    reader: TokenReader
    held_out: TokenReader | None
    domains: Domains
    selection: Selection | None
    """Units that are kept without being measured; it may leave kinds open."""

    @property
    def source_key(self) -> str:
        """Tells the source from every other model: its weights, and what computes with them."""
        return f"{weights_fingerprint(self.folder)} {self.model.key}"

    @property
    def kinds(self) -> dict[str, UnitKind]:
        """The kinds of units that are removed."""
        kinds = unit_kinds(self.target, self.source)
        z = self.selection.z if self.selection else {}
        for name, kind in kinds.items():
            counts = z[name].sum(-1) if name in z else None
            if counts is not None and bool((counts != kind.target).any()):
                kinds[name] = replace(kind, uneven=True)
        return kinds


def open_inputs(
    config: ShearConfig, selection: Selection | None = None, *, apart: bool = False
) -> Inputs:
    """Opens source and data and checks that they fit each other and the target, which may remove
    layers of blocks `apart` where a selection says which.

    The weights of a hub id are fetched only when everything else is right.
    """
    apart = apart or selection is not None
    parse_sizes(config.target, apart=apart)
    options = DomainOptions(
        weights=config.domain_weights,
        reference=config.reference_losses,
        reference_fit=config.reference_fit,
    )
    folder, model = find_source(config)
    source = shape_of(model)
    target = parse_target(config.target, source, apart=apart)
    pruned = config_of(target, model)
    require_loadable(pruned, folder)
    require_reachable(unit_kinds(target, source), config.masks)
    if config.layer_widths == "free":
        require_room_for_widths(target, source, config.align)
    config = resolve(config, model, target)
    reader, held_out = open_data(config.data, config.train, model, folder)
    warn_of_no_tokenizer(folder)
    require_apart(Path(config.output), models={"--source": folder}, data=Path(config.data))
    check_teacher("the source", model, config.distillation, config.train, model)
    domains = starting_domains(
        reader.sizes,
        options,
        parameters=pruned.num_parameters(),
        sheared=None,
        needs_reference=False,
    )
    domains = replayed(domains, config.mixture, options, reader, config.train, {})
    folder = resolve_model(config.source, option="--source")
    check_weights(folder, model)
    return Inputs(config, folder, model, source, target, reader, held_out, domains, selection)


def require_same_inputs(inputs: Inputs, context: DistributedContext) -> None:
    """Raises InputError on every rank where the source or the data of some are others, before
    anything is measured on them together."""
    if context.world > 1:
        found = {
            "--source": weights_fingerprint(inputs.folder),
            "--data": inputs.reader.fingerprint,
            "--target": inputs.target.describe(),
        }
        require_same(found, context.gather, SAME_FILES)


def find_source(config: ShearConfig) -> tuple[Path, ModelConfig]:
    """The source's folder, where weights may still be missing, and its architecture."""
    name = config.source
    folder = find_model_with_data(
        lambda: resolve_model(name, weights=False, option="--source"),
        config.data,
        config.train.seq_len,
        local_folder(name) if is_hub_id(name) else name,
    )
    model = load_config(folder)
    require_even(model, name)
    return folder, model
