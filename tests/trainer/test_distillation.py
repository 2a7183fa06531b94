"""The frozen teacher: its share of the gradient on any number of ranks, and runs that use it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from data.errors import InputError
from data.mixture import MixtureConfig
from data.reader import TokenReader
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokenizer
from tests.trainer.test_cpt import stop_during
from tests.trainer.test_loop import (
    LENGTH,
    ROWS,
    SEED,
    Gradients,
    RaggedStream,
    make_masks,
    ragged_trainer,
)
from tests.trainer.tiny import SHAPE, losses, options, pretrain
from trainer import memory, parallel
from trainer.config import DISTILL_WEIGHT, DistillationConfig
from trainer.distillation import (
    Teacher,
    TeacherSource,
    load_teacher,
    open_teacher,
    resolve_teacher,
)
from trainer.loop import Trainer
from trainer.memory import teacher_bytes
from trainer.models.decoder import CausalLM, next_token_targets
from trainer.models.hf import init_weights, load_config, load_model
from trainer.models.sources import weights_fingerprint

HALF = DistillationConfig(weight=0.5, temperature=2.0, top_k=0)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders tied/ and untied/ of teachers wider than the student, far from uniform."""
    root = tmp_path_factory.mktemp("teachers")
    tokenizer = write_tokenizer(root / "tokenizer")
    for name in ("tied", "untied"):
        tied = name == "tied"
        sizes = {"hidden_size": 48, "initializer_range": 0.2, "tie_word_embeddings": tied}
        write_model(root / name, tokenizer, **sizes)
    return root


def source_of(folder: Path) -> TeacherSource:
    return TeacherSource(folder, load_config(folder))


def single_process_step(folder: Path, config: DistillationConfig) -> tuple[Gradients, float, float]:
    """Gradients, mean cross-entropy and mean divergence of the whole batch, through full logits."""
    model = CausalLM(SHAPE)
    init_weights(model, seed=SEED)
    batch, masks = RaggedStream().next(), make_masks()
    ids = torch.from_numpy(batch.ids)
    targets, valid = next_token_targets(ids, batch.valid)
    logits = model(ids, masks=masks)[valid]
    with torch.no_grad():
        teacher_logits = load_model(folder)(ids)[valid]
    cross_entropy = F.cross_entropy(logits, targets[valid])
    student = (logits / config.temperature).log_softmax(1)
    teacher = (teacher_logits / config.temperature).softmax(1)
    if config.top_k:
        teacher, ids = teacher.topk(config.top_k, dim=1)
        own = student.gather(1, ids)
        student = torch.cat([own, (1 - own.exp().sum(1, keepdim=True)).log()], dim=1)
        teacher = torch.cat([teacher, 1 - teacher.sum(1, keepdim=True)], dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean")
    assert config.weight is not None and config.temperature is not None
    factor = config.weight * config.temperature**2
    ((1 - config.weight) * cross_entropy + factor * divergence).backward()
    gradients = {
        f"mask.{n}": z.grad.numpy() for n, z in masks.tensors().items() if z.grad is not None
    }
    gradients |= {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return gradients, cross_entropy.item(), divergence.item()


def step_on_ranks(
    folder: Path, config: DistillationConfig, accumulations: tuple[int, ...], **changes: Any
) -> list[tuple[Gradients, float, float]]:
    """What single_process_step gives, from one step of a trainer per number of micro-batches."""
    results = []
    context = parallel.init(replicas=changes.get("replicas", 1), threads=1)
    for accumulation in accumulations:
        micro = ROWS // context.world // accumulation
        train = options(global_batch=ROWS, micro_batch=micro, seq_len=LENGTH, **changes)
        trainer, capture = ragged_trainer(train, context)
        trainer.teacher = load_teacher(source_of(folder), config, train, SHAPE, context)
        trainer.train_step()
        assert trainer.bar_fields["kl"] == f"{trainer.record['distill_kl']:.3f}"
        results.append((capture.gradients, trainer.record["loss"], trainer.record["distill_kl"]))
    return results


@pytest.mark.parametrize(
    ("world", "name", "top_k", "changes"),
    [
        (1, "tied", 0, {}),
        (2, "tied", 7, {"activation_checkpointing": True}),
        (2, "untied", 0, {"reshard_after_forward": True}),
        (2, "untied", 0, {"replicas": 2}),
        (4, "tied", 0, {"replicas": 2, "reshard_after_forward": True}),
    ],
)
def test_gradients_equal_a_single_process(
    teachers: Path, world: int, name: str, top_k: int, changes: dict[str, Any]
) -> None:
    config = replace(HALF, top_k=top_k)
    expected, loss, divergence = single_process_step(teachers / name, config)
    assert divergence > 0.03
    arguments = (teachers / name, config, (1, 4))
    for rank in run_ranks(lambda: step_on_ranks(*arguments, **changes), world):
        for gradients, rank_loss, rank_divergence in rank:
            assert gradients.keys() == expected.keys()
            for key, value in gradients.items():
                np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-6, err_msg=key)
            assert rank_loss == pytest.approx(loss, abs=1e-6)
            assert rank_divergence == pytest.approx(divergence, abs=1e-6)


def held_bytes(teacher: Teacher) -> tuple[int, int]:
    """Bytes of this rank's shards, and of the parameters that are gathered now."""
    gathered = [p for p in teacher.network.parameters() if not isinstance(p, DTensor)]
    teacher_gathered = sum(p.untyped_storage().nbytes() for p in gathered)
    parallel.reshard(teacher.network)
    shards = sum(parallel.to_local(p).nbytes for p in teacher.network.parameters())
    return shards, teacher_gathered


def teacher_on_a_rank(folder: Path, reshard: bool) -> tuple[int, int, bool]:
    context = parallel.init(threads=1)
    train = options(precision="bf16", reshard_after_forward=reshard)
    teacher = load_teacher(source_of(folder), HALF, train, SHAPE, context)
    assert teacher is not None
    ids = torch.arange(12).view(2, 6)
    teacher_output = teacher(ids)
    assert {p.dtype for p in teacher.network.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.network.parameters())
    whole = load_model(folder, dtype=torch.bfloat16)
    logits = teacher_output.states @ teacher_output.head_weight.t()
    same = torch.equal(logits, whole(ids)) and not logits.requires_grad
    return *held_bytes(teacher), same


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_teacher_is_sharded_in_the_compute_dtype(
    teachers: Path, name: str, reshard: bool
) -> None:
    shape = load_config(teachers / name)
    estimate = teacher_bytes(shape, 2, 2, whole=not reshard)
    for shards, gathered, same in run_ranks(teacher_on_a_rank, 2, teachers / name, reshard):
        assert same
        assert abs(shards + gathered - estimate) <= 0.02 * estimate
    ((shards, _, same),) = run_ranks(teacher_on_a_rank, 1, teachers / name, reshard)
    assert same and shards == teacher_bytes(shape, 2, 1, whole=not reshard)


def test_student_and_teacher_must_fit_together(
    teachers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = parallel.init(threads=1)
    source = source_of(teachers / "untied")
    needed = 16 * SHAPE.num_parameters() + 4 * source.shape.num_parameters()
    monkeypatch.setattr(memory, "total_memory", lambda _: needed)
    assert load_teacher(source, HALF, options(), SHAPE, context) is not None
    monkeypatch.setattr(memory, "total_memory", lambda _: needed - 1)
    with pytest.raises(InputError, match=r"GB of the teacher's weights.*--distill-weight 0"):
        load_teacher(source, HALF, options(), SHAPE, context)


def train(workspace: Path, output: Path, teacher: Path, **changes: Any) -> Trainer | None:
    distillation = changes.pop("distillation", HALF)
    mixture = changes.pop("mixture", MixtureConfig())
    return pretrain(
        options(**({"steps": 8, "save_interval": 2} | changes)),
        model=workspace / "model",
        data=workspace / "tokens",
        output=output,
        reference_losses="alpha=2.0,beta=5.0",
        teacher=str(teacher),
        distillation=distillation,
        mixture=mixture,
    )


def divergences(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["distill_kl"] for line in lines]


@pytest.mark.parametrize("top_k", [0, 8])
def test_training_approaches_the_teacher(
    workspace: Path, teachers: Path, tmp_path: Path, top_k: int
) -> None:
    config = DistillationConfig(weight=1.0, temperature=1.0, top_k=top_k)
    fixed = MixtureConfig(kind="fixed")
    train(workspace, tmp_path, teachers / "untied", steps=12, distillation=config, mixture=fixed)
    found = divergences(tmp_path)
    assert found[0] > 0.1 and found[-1] < 0.8 * found[0]


def test_a_resumed_run_equals_an_uninterrupted_one(
    workspace: Path, teachers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(workspace, whole, teachers / "tied")
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        stopped = train(workspace, parts, teachers / "tied")
    assert stopped is not None and stopped.stopping
    for changes, message in (
        ({"teacher": teachers / "untied"}, r": --teacher is another model\. Repeat"),
        ({"distillation": replace(HALF, weight=0.25)}, r"--distill-weight was 0\.5, now 0\.25\. "),
        ({"distillation": replace(HALF, temperature=1.0)}, r"--distill-temperature was 2\.0, now"),
        ({"distillation": replace(HALF, top_k=5)}, r"--distill-top-k was 0, now '5 and"),
    ):
        arguments: dict[str, Any] = {"teacher": teachers / "tied"} | changes
        with pytest.raises(InputError, match=message):
            train(workspace, parts, **arguments)
    train(workspace, parts, teachers / "tied")
    assert losses(parts) == losses(whole) and divergences(parts) == divergences(whole)
    name = "model/model.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_losses_do_not_depend_on_the_number_of_ranks(
    workspace: Path, teachers: Path, tmp_path: Path
) -> None:
    def run(output: Path) -> None:
        train(workspace, output, teachers / "untied", steps=4, lr=1e-3)

    for world in (1, 2):
        run_ranks(run, world, tmp_path / str(world))
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=0, atol=1e-5)
    one, two = divergences(tmp_path / "1"), divergences(tmp_path / "2")
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)


def test_a_run_without_a_teacher_records_none(workspace: Path, tmp_path: Path) -> None:
    pretrain(
        options(steps=1),
        model=workspace / "model",
        data=workspace / "tokens",
        output=tmp_path,
        reference_losses="alpha=2.0,beta=5.0",
    )
    assert "distill_kl" not in (tmp_path / "metrics.jsonl").read_text()
    assert "distill" not in (tmp_path / "run.json").read_text()


def test_other_vocabularies_tokenizers_and_lengths_are_refused(
    workspace: Path, tmp_path: Path
) -> None:
    student = load_config(workspace / "model")
    reader = TokenReader(workspace / "tokens", 16)
    padded = write_model(tmp_path / "padded", workspace / "tokenizer", vocab_size=320)
    other = write_model(tmp_path / "other", workspace / "tokenizer")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    short = write_model(tmp_path / "short", workspace / "tokenizer", max_position_embeddings=8)
    top = replace(HALF, top_k=260)
    for name, config, message in (
        (str(padded), HALF, r"padded predicts 320 ids .*the student 259.*padding included"),
        (str(other), HALF, r"other has another tokenizer than the training data"),
        (str(short), HALF, r"--seq-len 16 is longer than the 8 positions of --teacher .*short"),
        (str(workspace / "model"), top, r"--distill-top-k 260 is more than the vocabulary of 259"),
        ("/nowhere/model", HALF, r"--teacher /nowhere/model: no such model"),
        (None, HALF, r"--distill-weight 0\.5 needs a model to learn from: add --teacher"),
        ("any", DistillationConfig(), r"--teacher any teaches nothing at --distill-weight 0"),
    ):
        with pytest.raises(InputError, match=message):
            open_teacher(name, config, options(), student, reader)
    assert open_teacher(None, DistillationConfig(), options(), student, reader) is None


def test_a_bad_teacher_is_refused_before_any_weight_is_read(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = write_model(tmp_path / "padded", workspace / "tokenizer", vocab_size=320)
    monkeypatch.delattr("trainer.cpt.build_model")
    monkeypatch.delattr("trainer.cpt.load_teacher")
    with pytest.raises(InputError, match="padded predicts 320 ids"):
        train(workspace, tmp_path / "out", padded)
    assert not (tmp_path / "out").exists()


def test_an_unnamed_weight_depends_on_the_teacher() -> None:
    unnamed = DistillationConfig(temperature=1.0, top_k=64)
    for name, weight in (("some/model", DISTILL_WEIGHT), (None, 0.0)):
        found = resolve_teacher(name, unnamed, None)
        assert found[:2] == (name, replace(unnamed, weight=weight))
        assert (found[2] is None) == (name is not None)  # --distill-top-k alone has no effect
    off = DistillationConfig(weight=0.0, temperature=1.0, top_k=0)
    assert resolve_teacher("some/model", off, None) == ("some/model", off, None)


def test_a_report_of_a_former_version_may_lack_what_was_no_option_then(teachers: Path) -> None:
    known = {"weight": 0.25, "kind": "forward-kl", "temperature": 2.0}
    sheared = {"source": str(teachers / "tied"), "distillation": known}
    _, config, _ = resolve_teacher(None, DistillationConfig(), sheared)
    assert config == DistillationConfig(weight=0.25, temperature=2.0, top_k=0)


def test_what_is_given_as_by_default_counts_as_given_after_shearing(teachers: Path) -> None:
    known: dict[str, Any] = {"weight": 0.25, "kind": "forward-kl", "temperature": 2.0, "top_k": 50}
    sheared = {"source": str(teachers / "tied"), "distillation": known}
    given: dict[str, Any]
    for given in ({"temperature": 1.0}, {"top_k": 0}, {"temperature": 1.0, "top_k": 0}, {}):
        _, config, _ = resolve_teacher(None, DistillationConfig(**given), sheared)
        assert config == DistillationConfig(**(known | given))


def test_a_teacher_that_nobody_named_can_be_left_out(
    workspace: Path, teachers: Path, tmp_path: Path
) -> None:
    """As where a sheared model was given more ids."""
    run = tmp_path / "shear"
    write_model(run / "model", workspace / "tokenizer", vocab_size=261)
    report = {"source": str(teachers / "tied"), "distillation": {"weight": 0.5}, "steps": 1}
    (run / "shear.json").write_text(json.dumps(report))
    arguments: dict[str, Any] = {"data": workspace / "tokens", "output": tmp_path / "out"}
    with pytest.raises(InputError, match=r"student 261: .*cut from it: --distill-weight 0 "):
        pretrain(options(steps=1), model=run, **arguments)
    with pytest.raises(InputError, match=r"student's vocabulary$"):
        train(workspace, tmp_path / "out", write_model(tmp_path / "other", vocab_size=261))
    off = DistillationConfig(weight=0.0)
    pretrain(options(steps=1), model=run, distillation=off, **arguments)


def test_a_plain_model_with_a_weight_is_told_to_name_a_teacher(
    workspace: Path, tmp_path: Path
) -> None:
    plain = write_model(tmp_path / "plain", workspace / "tokenizer")
    arguments: dict[str, Any] = {"data": workspace / "tokens", "output": tmp_path / "out"}
    with pytest.raises(InputError, match=r"needs a model to learn from: add --teacher [^.]*$"):
        pretrain(options(steps=1), model=plain, distillation=HALF, **arguments)


@pytest.mark.parametrize("weight", [None, 0.5])
@pytest.mark.parametrize("change", ["moved", "other weights"])
def test_a_teacher_that_left_while_its_run_was_stopped(
    weight: float | None,
    change: str,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_model(tmp_path / "source", workspace / "tokenizer", initializer_range=0.2)
    run = tmp_path / "shear"
    write_model(run / "model", workspace / "tokenizer")
    report = {
        "source": str(source),
        "source_weights": weights_fingerprint(source),
        "distillation": {"weight": 0.5},
        "steps": 1,
    }
    (run / "shear.json").write_text(json.dumps(report))
    arguments: dict[str, Any] = {"data": workspace / "tokens", "output": tmp_path / "out"}
    arguments |= {"model": run, "distillation": DistillationConfig(weight=weight)}
    with monkeypatch.context() as patch:
        stop_during(3, patch)
        pretrain(options(steps=6), **arguments)
    shutil.copytree(source, tmp_path / "copy")
    if change == "moved":
        source.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(source)
        write_model(source, workspace / "tokenizer", initializer_range=0.1)
    words = {"moved": "is gone", "other weights": "holds other weights now"}[change]
    with pytest.raises(InputError, match=rf"learns from .*/source, which {words}: put it back, or"):
        pretrain(options(steps=6), **arguments)
    # As told.
    assert pretrain(options(steps=6), teacher=str(tmp_path / "copy"), **arguments) is not None
    # Finished, it needs the model no more.
    assert pretrain(options(steps=6), **arguments) is None
    off = arguments | {"distillation": DistillationConfig(weight=0.0)}
    with pytest.raises(InputError, match=r"--distill-weight: it had a teacher"):
        pretrain(options(steps=6), **off)


def test_what_has_no_effect_is_said_where_shearing_had_no_teacher() -> None:
    sheared = {"source": "models/base", "distillation": {"weight": 0.0}}
    _, _, note = resolve_teacher(None, DistillationConfig(temperature=1.0), sheared)
    assert note is not None and "--distill-temperature 1 has no effect" in note


def test_a_teacher_is_named_as_a_shell_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, note = resolve_teacher(None, DistillationConfig(), {"source": "my models/base"})
    # It is gone.
    assert note is not None and "--teacher" not in note
    (tmp_path / "my models" / "base").mkdir(parents=True)
    _, _, note = resolve_teacher(None, DistillationConfig(), {"source": "my models/base"})
    assert note is not None and note.endswith("--teacher 'my models/base'")


@pytest.mark.parametrize("known", [None, {}, {"weight": 0.0}])
def test_training_after_shearing_without_a_teacher_says_that_it_has_none(
    known: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    sheared = {"source": "models/base", "distillation": known}
    name, config, note = resolve_teacher(None, DistillationConfig(), sheared)
    assert (name, config.weight) == (None, 0.0)
    assert note is not None and note.endswith("to learn from the source: --teacher models/base")
    off = DistillationConfig(weight=0.0, temperature=1.0, top_k=0)
    assert resolve_teacher(None, off, sheared) == (None, off, None)
