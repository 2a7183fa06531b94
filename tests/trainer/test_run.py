"""What is checked before weights are loaded, and what a run leaves behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from data.errors import InputError
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.trainer.tiny import options, pretrain
from trainer import parallel
from trainer.inputs import find_model_with_data, open_data
from trainer.models import hf
from trainer.models.config import ModelConfig
from trainer.models.hf import load_config
from trainer.run import build_model, pretrained, random_init
from trainer.saving import full_tensors, publish, require_copy, save_pretrained


@pytest.fixture
def shape(workspace: Path) -> ModelConfig:
    return load_config(workspace / "model")


def test_missing_data_names_the_command(
    workspace: Path, shape: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"python -m data\.tokenize --input .*--tokenizer"):
        open_data(str(tmp_path / "none"), options(), shape, workspace / "model")


def test_sequences_longer_than_the_model(workspace: Path, shape: ModelConfig) -> None:
    with pytest.raises(InputError, match=r"--seq-len 512 .*256 positions"):
        open_data(str(workspace / "tokens"), options(seq_len=512), shape, workspace / "model")


def test_ids_beyond_the_vocabulary(workspace: Path, shape: ModelConfig) -> None:
    small = replace(shape, vocab_size=100)
    with pytest.raises(InputError, match=r"259 ids, the model has 100"):
        open_data(str(workspace / "tokens"), options(), small, workspace / "model")


def test_another_tokenizer(workspace: Path, shape: ModelConfig, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(workspace / "model", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["T"], vocabulary["h"] = vocabulary["h"], vocabulary["T"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="another tokenizer"):
        open_data(str(workspace / "tokens"), options(), shape, other)


def test_evaluation_can_be_turned_off(workspace: Path, shape: ModelConfig) -> None:
    data, source = str(workspace / "tokens"), workspace / "model"
    assert open_data(data, options(eval_sequences=0), shape, source)[1] is None
    held_out = open_data(data, options(), shape, source)[1]
    assert held_out is not None and held_out.split == "held_out"


def copy_model(source: Path, target: Path) -> None:
    context = parallel.init(threads=1)
    config = load_config(source)
    model = build_model(config, options(), context, load=pretrained(source))
    save_pretrained(model, context, target, tokenizer_from=source)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_folders_load_in_transformers(workspace: Path, tmp_path: Path, tied: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "model"
    write_model(source, workspace / "tokenizer", tie_word_embeddings=tied)
    run_ranks(copy_model, 3, source, target)
    ids = torch.arange(40).reshape(2, 20)
    original = AutoModelForCausalLM.from_pretrained(source)
    reloaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(original(ids).logits, reloaded(ids).logits)
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def fail_to_save(source: Path, target: Path) -> str:
    def refuse(*_: object) -> None:
        raise SafetensorError("No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError) as caught:
        patch.setattr(hf, "save_tensors", refuse)
        copy_model(source, target)
    return str(caught.value)


def test_a_failed_save_is_an_error_on_every_rank(workspace: Path, tmp_path: Path) -> None:
    for message in run_ranks(fail_to_save, 2, workspace / "model", tmp_path / "model"):
        assert "No space left" in message and "free space" in message


def test_a_report_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    context = parallel.init(threads=1)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*report\.json"):
        publish(context, {}, tmp_path / "file" / "report.json")


def test_one_error_names_missing_model_and_missing_data(workspace: Path, tmp_path: Path) -> None:
    def find() -> Path:
        raise InputError("no model")

    with pytest.raises(InputError, match=r"^no model$"):
        find_model_with_data(find, str(workspace / "tokens"), 64, "tokenizer")
    with pytest.raises(InputError) as caught:
        find_model_with_data(find, str(tmp_path / "none"), 64, "tokenizer")
    message = str(caught.value)
    assert "1. no model\n2. --data" in message
    assert "hf download cerebras/SlimPajama-627B --repo-type dataset" in message
    assert f"--tokenizer tokenizer --output {tmp_path / 'none'} --seq-len 64 --workers" in message


def draw(shape: ModelConfig) -> float:
    context = parallel.init(threads=1)
    model = build_model(shape, options(), context, load=random_init(5))
    return sum(float(value.double().abs().sum()) for _, value in full_tensors(model))


def test_random_weights_do_not_depend_on_ranks(shape: ModelConfig) -> None:
    assert run_ranks(draw, 1, shape)[0] == run_ranks(draw, 3, shape)[2]


def refused_copy(good: Path, bad: Path) -> str:
    """The error on this rank when rank 0 cannot write its copy; other ranks' files do not count."""
    context, report = parallel.init(threads=1), Path("out/cpt.json")
    require_copy(context, None, report)
    require_copy(context, good if context.is_main else bad, report)
    with pytest.raises(InputError) as error:
        require_copy(context, bad if context.is_main else good, report)
    return str(error.value)


def test_every_rank_stops_when_rank_zero_cannot_write_the_copy(tmp_path: Path) -> None:
    for message in run_ranks(refused_copy, 2, tmp_path / "copy.json", tmp_path):
        assert message == f"--json {tmp_path} is a folder; name a file in it"
    assert list(tmp_path.iterdir()) == []


def test_dropout_of_a_models_config_is_said_to_be_left_out(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", workspace / "tokenizer", attention_dropout=0.1)
    train = options(steps=1)
    pretrain(train, model=model, data=workspace / "tokens", output=tmp_path / "out")
    told = "note: attention_dropout 0.1 of the model's config: training leaves dropout out"
    assert told in capsys.readouterr().out
