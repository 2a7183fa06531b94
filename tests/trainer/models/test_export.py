"""What goes with the weights: companions, the original's dtype, and checks before any work."""

import json
import os
import subprocess
import sys
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.errors import InputError
from data.manifest import ChatRecord
from data.tokenizers import load_tokenizer
from tests.factories import write_model, write_tokenizer
from trainer import parallel
from trainer.models.export import add_chat, companions, require_loadable, widen
from trainer.models.hf import load_config, load_model, save_model
from trainer.saving import save_pretrained

TRAVEL = """
added_tokens.json additional_chat_templates/tool_use.jinja chat_template.jinja custom_special.dat
generation_config.json LICENSE LICENSE.txt merges.txt Notice.md preprocessor_config.json
special_tokens_map.json tekken.json tokenizer.json tokenizer.model tokenizer.model.v3
tokenizer_config.json USE_POLICY.md vocab.json vocab.txt
""".split()
STAY = """
adapter_config.json adapter_model.bin cpt.json custom_generate/generate.py finetune.json model.gguf
modeling_llama.py model.safetensors.index.fp32.json onnx/model.onnx optimizer.pt
original/params.json params.json pytorch_model.bin pytorch_model.bin.index.json
quantize_config.json README.md rng_state_0.pth run.json scheduler.pt shear.json tf_model.h5
trainer_state.json training_args.bin
""".split()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return write_model(tmp_path / "source", tokenizer, tie_word_embeddings=False)


def set_values(path: Path, **change: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | change))


def save_again(source: Path, target: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a copy of the model in `source`."""
    model = load_model(source)
    save_model(model.config, model.state_dict(), target, tokenizer_from=source, dtype=dtype)
    values: dict[str, Any] = json.loads((target / "config.json").read_text())
    return values


def test_companions_travel_and_what_describes_the_source_stays(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*TRAVEL, *STAY, ".cache/x", ".gitattributes"):
        file = source / name
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text("{}")
    (source / "huge.dat").touch()
    os.truncate(source / "huge.dat", 2**28 + 1)
    (source / "tokenizer.model").unlink()
    save_again(source, tmp_path / "out", torch.float32)
    found = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*")}
    written = {"config.json", "model.safetensors", "additional_chat_templates"}
    assert found == set(TRAVEL) - {"tokenizer.model"} | written
    printed = capsys.readouterr().out
    assert "not copied to the new model: README.md, adapter_config.json" in printed


def test_code_of_a_tokenizer_travels_and_is_not_run(source: Path, tmp_path: Path) -> None:
    for name in ("tokenization_x.py", "modeling_x.py"):
        (source / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    set_values(
        source / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "org/repo--tokenization_x.Tokenizer"]},
    )
    set_values(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    config = load_config(source)
    require_loadable(config, source)
    assert "auto_map" not in save_again(source, tmp_path / "out", torch.float32)
    assert (tmp_path / "out" / "tokenization_x.py").exists()
    assert not (tmp_path / "out" / "modeling_x.py").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token_id": 259}, r"config\.json: pad_token_id is 259, .* end at 258.* null"),
        ({"pad_token_id": -300}, r"pad_token_id is -300"),
        ({"attention_dropout": float("nan")}, r"config\.json: .*attention_dropout.*correct them"),
    ],
)
def test_a_config_that_transformers_cannot_build_is_refused(
    change: dict[str, Any], message: str, source: Path
) -> None:
    set_values(source / "config.json", **change)
    with pytest.raises(InputError, match=message):
        require_loadable(load_config(source), source)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", "{", "not valid JSON.*remove it"),
        ("generation_config.json", "[]", "a list, not an object"),
        ("generation_config.json", '{"max_new_tokens": -5}', "transformers refuses it"),
        ("tokenizer_config.json", "5", "a whole number, not an object"),
    ],
)
def test_companions_that_transformers_cannot_read_are_refused(
    name: str, text: str, message: str, source: Path
) -> None:
    (source / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        require_loadable(load_config(source), source)
    assert str(source / name) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
)
def test_a_byte_order_mark_that_transformers_cannot_read_is_named(name: str, source: Path) -> None:
    (source / name).write_bytes(BOM_UTF8 + (source / name).read_bytes())
    with pytest.raises(InputError, match=rf"/{name}: begins with a byte-order mark.*without one"):
        require_loadable(load_config(source), source)
        load_tokenizer(source)


def test_a_companion_that_cannot_be_read_is_refused_before_any_work(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "LICENSE")
    require_loadable(load_config(source), source)
    (source / "LICENSE").touch()
    with pytest.raises(InputError, match=r"/LICENSE: it goes along .* cannot be read"):
        require_loadable(load_config(source), source)


@pytest.mark.parametrize("pad", [None, 258, 0])
def test_what_transformers_can_build_passes(pad: int | None, source: Path) -> None:
    set_values(source / "config.json", pad_token_id=pad)
    set_values(source / "generation_config.json", temperature=0.6, max_length=20)
    require_loadable(load_config(source), source)
    assert companions(source)[0]


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("stated", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_training_returns_to_the_dtype_of_the_original(
    name: str, stated: str | None, source: Path, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    values = save_again(source, original, getattr(torch, name))
    for key in {"dtype", "torch_dtype", "original_dtype"} & set(values):
        del values[key]
    values |= {} if stated is None else {stated: name}
    (original / "config.json").write_text(json.dumps(values))
    between = tmp_path / "between"
    save_again(original, between, torch.float32)
    assert dtypes(between) == {torch.float32}
    context = parallel.init(threads=1)
    for given, expected in ((None, name), ("float16", "float16"), ("float32", "float32")):
        out = tmp_path / f"out-{given}"
        save_pretrained(load_model(between), context, out, tokenizer_from=between, dtype=given)
        assert dtypes(out) == {getattr(torch, expected)}
        written = json.loads((out / "config.json").read_text())
        assert written["dtype"] == written["torch_dtype"] == expected
        assert written.get("original_dtype", expected) == name
        assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == f"torch.{expected}"


def test_values_that_float16_cannot_hold_are_not_written(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = 70_000
    with pytest.raises(InputError, match=r"model\.norm\.weight has values beyond .* bfloat16"):
        save_model(model.config, model.state_dict(), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    save_model(model.config, model.state_dict(), tmp_path / "out", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("extra", "expected"), [(["<a>"], ["<a>"]), ([], ["<b>"]), (None, ["<b>"]), ({}, ["<b>"])]
)
def test_of_two_lists_of_special_tokens_the_one_of_transformers_5_is_kept(
    extra: object, expected: list[str], source: Path
) -> None:
    path = source / "tokenizer_config.json"
    set_values(path, extra_special_tokens=extra, additional_special_tokens=["<b>"])
    before = AutoTokenizer.from_pretrained(source).all_special_tokens
    widen(source)
    assert json.loads(path.read_text())["additional_special_tokens"] == expected
    assert AutoTokenizer.from_pretrained(source).all_special_tokens == before


def test_an_interpreter_without_docstrings_is_named(source: Path) -> None:
    """What transformers says of it is no fault of the config."""
    line = (
        "from pathlib import Path; from trainer.models.export import require_loadable; "
        "from trainer.models.hf import load_config; "
        f"require_loadable(load_config(Path({str(source)!r})), Path({str(source)!r}))"
    )
    result = subprocess.run([sys.executable, "-OO", "-c", line], capture_output=True, text=True)
    assert "start without -OO" in result.stderr


@pytest.mark.parametrize(
    ("generation", "end", "expected"),
    [
        (None, 5, {"bos_token_id": 1, "eos_token_id": [5, 2]}),
        ({"top_p": 0.9, "eos_token_id": 7}, 5, {"top_p": 0.9, "eos_token_id": [5, 7]}),
        ({"eos_token_id": [7, 5]}, 5, {"eos_token_id": [7, 5]}),
        ({"eos_token_id": 5, "_from_model_config": True}, 5, None),
        ({"_from_model_config": True}, 5, {"eos_token_id": [5]}),
        ({"eos_token_id": None, "top_k": 5}, 5, {"eos_token_id": [5], "top_k": 5}),
        ({"eos_token_id": 7}, None, {"eos_token_id": 7}),
        (None, None, None),
    ],
)
def test_a_chat_template_replaces_the_tokenizers_and_ends_generation(
    source: Path,
    generation: dict[str, Any] | None,
    end: int | None,
    expected: dict[str, Any] | None,
) -> None:
    set_values(source / "tokenizer_config.json", chat_template="old")
    path = source / "generation_config.json"
    path.unlink()
    if generation is not None:
        path.write_text(json.dumps(generation))
    add_chat(ChatRecord("{{ 'new' }}", "mine.jinja", end, 64), source)
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    assert tokenizer.chat_template == "{{ 'new' }}"
    assert "chat_template" not in json.loads((source / "tokenizer_config.json").read_text())
    found = json.loads(path.read_text()) if path.exists() else None
    assert found == (generation if expected is None else expected)
