"""The frozen teacher of a run: opened and checked, loaded in shards, asked once per micro-batch."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from data.errors import InputError
from data.paths import quoted
from data.reader import TokenReader
from data.tokenizers import holds_tokenizer, load_tokenizer
from trainer.config import DISTILL_WEIGHT, DISTILLED, DistillationConfig, TrainConfig
from trainer.kernels.linear_cross_entropy import TeacherOutput
from trainer.memory import check_memory
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config, load_sharded
from trainer.models.masks import Masks
from trainer.models.sources import resolve_model, weights_fingerprint
from trainer.parallel import DistributedContext, compute_dtype, shard


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """A teacher that fits the run, not loaded yet."""

    folder: Path
    """Its Hugging Face folder."""
    shape: ModelConfig


class TeacherModel(CausalLM):
    """A language model that is asked for what its loss would need instead of logits."""

    def states_and_head(
        self, ids: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids [B, S] -> output of the final norm [B, S, d] and the head's weight [V, d]."""
        masks = Masks()
        return self._hidden_states(ids, masks, masks.stream(), documents), self.head_weight


class Teacher:
    """The model whose next-token distributions training follows.

    Its parameters are stored in the compute dtype, sharded, without gradients. The head stays
    gathered from the first call on, because the student's loss reads it after the teacher's forward
    pass has ended.
    """

    def __init__(self, network: TeacherModel, config: DistillationConfig) -> None:
        self.network = network
        self.config = config

    @torch.no_grad()
    def __call__(self, ids: Tensor, documents: Tensor | None = None) -> TeacherOutput:
        """What the teacher says about ids [B, S], of `documents` as CausalLM takes them;
        collective."""
        states, head_weight = self.network.states_and_head(ids, documents)
        config = self.config
        assert config.weight is not None
        assert config.temperature is not None and config.top_k is not None
        return TeacherOutput(states, head_weight, config.weight, config.temperature, config.top_k)


def resolve_teacher(
    name: str | None,
    config: DistillationConfig,
    sheared: dict[str, Any] | None,
    *,
    noted: str | None = None,
    finished: bool = False,
) -> tuple[str | None, DistillationConfig, str | None]:
    """The teacher of continued pre-training, its options filled in, and a note for the user.

    What the options leave open goes on as in shearing, whose report is `sheared` (None for other
    models): the source as teacher, the weight, and the temperature and ids that are compared.

    `noted` is the fingerprint of the teacher that the run in the output folder has, if there is
    one, and `finished` whether it needs it no more. Raises InputError where it does, and the source
    is gone.
    """
    known = (sheared or {}).get("distillation") or {}
    asked = name is not None or config.weight is not None
    former = known if known.get("weight") else {}
    given = {key: getattr(config, key) for key in DISTILLED if getattr(config, key) is not None}
    usual = {key: former.get(key, value) for key, value in DISTILLED.items()}
    weight = former.get("weight") if config.weight is None else config.weight
    config = replace(config, weight=weight, **(usual | given))
    idle = ", ".join(f"--distill-{k.replace('_', '-')} {v:g}" for k, v in given.items())
    if config.weight is None and name is None and sheared and not known.get("weight"):
        note = "note: shearing had no teacher, so training has none either"
        if sheared.get("source") and Path(sheared["source"]).exists():
            note += f"; to learn from the source: --teacher {quoted(sheared['source'])}"
        note += f" (so {idle} has no effect)" if idle else ""
        return None, replace(config, weight=0.0), note
    if config.weight is None:
        config = replace(config, weight=0.0 if name is None else DISTILL_WEIGHT)
    if name is None and not asked and not config.weight:
        note = f"note: no effect of {idle}: there is no teacher; --teacher names one"
        return None, config, note if idle else None
    if name is not None or not config.weight or not sheared:
        return name, config, None
    source = sheared["source"]
    if _holds(source, sheared.get("source_weights")):
        return (
            source,
            config,
            f"learns from {source} at weight {config.weight:g}, the model it was cut from",
        )
    if noted is not None and noted == sheared.get("source_weights"):
        if finished:
            return None, config, None
        gone = "is gone" if not Path(source).exists() else "holds other weights now"
        raise InputError(
            f"this run learns from {source}, which {gone}: put it back, or name another copy of "
            "the same model with --teacher; training without it is another run, with --output and "
            "--distill-weight 0"
        )
    if asked:
        return None, config, None
    note = f"note: the model that shearing learned from is no longer {source}; --teacher names it"
    return None, replace(config, weight=0.0), f"{note}. Training goes on without a teacher"


def _holds(folder: str, fingerprint: str | None) -> bool:
    """Whether `folder` holds the weights of this fingerprint (None: any)."""
    try:
        found = weights_fingerprint(Path(folder))
    except InputError:
        return False
    return fingerprint in (None, found)


def open_teacher(
    name: str | None,
    config: DistillationConfig,
    train: TrainConfig,
    student: ModelConfig,
    reader: TokenReader,
) -> TeacherSource | None:
    """The teacher `name`; None when distillation is off.

    The weights of a hub id are fetched at the end. Raises InputError when one of `name` and
    --distill-weight is missing, when there is no such model, and when it cannot teach `student` on
    the tokens of `reader`: another tokenizer, another number of ids, or too few positions.
    """
    if name is None or not config.weight:
        if config.weight:
            raise InputError(
                f"--distill-weight {config.weight} needs a model to learn from: add --teacher with "
                "the folder or hub id of the model that the student was pruned from"
            )
        if name is not None:
            raise InputError(
                f"--teacher {name} teaches nothing at --distill-weight 0: add for example "
                "--distill-weight 0.5, or leave --teacher out"
            )
        return None
    folder = resolve_model(name, weights=False, option="--teacher")
    shape = load_config(folder)
    check_teacher(f"--teacher {name}", shape, config, train, student)
    if (
        holds_tokenizer(folder)
        and load_tokenizer(folder).probe() != reader.manifest.tokenizer.probe
    ):
        raise InputError(
            f"--teacher {name} has another tokenizer than the training data: the same text gives "
            "other ids; choose a teacher of the student's own family"
        )
    return TeacherSource(resolve_model(name, option="--teacher"), shape)


def check_teacher(
    what: str,
    teacher: ModelConfig,
    config: DistillationConfig,
    train: TrainConfig,
    student: ModelConfig,
) -> None:
    """Raises InputError when a teacher of this shape, called `what`, cannot teach `student`."""
    if teacher.vocab_size != student.vocab_size:
        raise InputError(
            f"{what} predicts {teacher.vocab_size} ids (rows of its head), the student "
            f"{student.vocab_size}: their distributions can only be compared over the same ids, "
            "padding included; choose a teacher with the student's vocabulary"
        )
    if train.seq_len > teacher.max_position_embeddings:
        raise InputError(
            f"--seq-len {train.seq_len} is longer than the {teacher.max_position_embeddings} "
            f"positions of {what}; use --seq-len {teacher.max_position_embeddings} or less"
        )
    if (config.top_k or 0) > teacher.vocab_size:
        raise InputError(
            f"--distill-top-k {config.top_k} is more than the vocabulary of {teacher.vocab_size}: "
            "use 0 for all of it"
        )


def teacher_identity(
    config: DistillationConfig, source: TeacherSource | None, noted: str | None = None
) -> dict[str, Any]:
    """Entries of a run's identity: options and the teacher's weights; none without a teacher.

    `noted` stands for the weights of a teacher that a finished run had and that is gone.
    """
    if source is None and (noted is None or not config.weight):
        return {}
    options = {f"distill.{name}": value for name, value in asdict(config).items()}
    if config.top_k:
        # Former versions left the others out, which trains another model.
        options["distill.top_k"] = f"{config.top_k} and the others as one"
    return options | {
        "distill.teacher": noted if source is None else weights_fingerprint(source.folder)
    }


def load_teacher(
    source: TeacherSource | None,
    config: DistillationConfig,
    train: TrainConfig,
    student: ModelConfig,
    context: DistributedContext,
    *,
    frozen: bool = False,
) -> Teacher | None:
    """The loaded teacher, sharded on `context.device`; collective. None without a source.

    Raises InputError before any weight is read when teacher and `student` do not fit the memory
    together; of a student that is `frozen` most weights are not trained.
    """
    if source is None:
        return None
    check_memory(student, train, context, teacher=source.shape, frozen=frozen)
    dtype = compute_dtype(train.precision, context.device)
    with torch.device("meta"):
        network = TeacherModel(source.shape).to(dtype)
    network.requires_grad_(False).eval()
    shard(
        network,
        network.blocks,
        context.mesh,
        dtype=dtype,
        reshard_after_forward=train.reshard_after_forward,
    )
    if isinstance(network, FSDPModule):
        # Embedding, final norm and head only.
        network.set_reshard_after_forward(False, recurse=False)
        register_fsdp_forward_method(network, "states_and_head")
    network.to_empty(device=context.device)
    load_sharded(network, source.folder)
    return Teacher(network, config)
