"""GGUF files: converted as they are, or refused by name."""

import json
import random
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.errors import InputError
from data.tokenizers import load_tokenizer
from tests.factories import write_tokenizer
from tests.trainer.models.mutations import mutate_bytes
from trainer.models import sources
from trainer.models.gguf_header import check_gguf
from trainer.models.hf import load_config, load_model
from trainer.models.sources import convert_gguf, resolve_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

LAYERS, WIDTH, CHANNELS, HEADS = 2, 32, 48, 4


def write_gguf(path: Path, without: str = "", **sizes: Any) -> Path:
    """A tiny Llama with a byte tokenizer and a rotary base of 70,000; `sizes` are stated instead of
    the true ones, and the tensor `without` is left out."""
    folder = write_tokenizer(path.parent / "tokenizer")
    vocabulary = [*json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"], "ab"]
    shutil.rmtree(folder)
    writer: Any = gguf.GGUFWriter(path, sizes.get("family", "llama"))
    writer.add_block_count(sizes.get("layers", LAYERS))
    writer.add_context_length(sizes.get("context", 128))
    writer.add_embedding_length(sizes.get("width", WIDTH))
    writer.add_feed_forward_length(CHANNELS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(70_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    if "parts" in sizes:
        writer.add_uint16("split.count", sizes["parts"])
    if "scaling" in sizes:
        writer.add_string("llama.rope.scaling.type", sizes["scaling"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        if name != without:
            values = torch.randn(shape, generator=generator) * 0.3
            writer.add_tensor(f"{name}.weight", values.numpy())

    add("token_embd", len(vocabulary), WIDTH)
    add("output", len(vocabulary), WIDTH)
    add("output_norm", WIDTH)
    if "extra" in sizes:
        add(sizes["extra"], WIDTH // HEADS // 2)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}", WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}", CHANNELS, WIDTH)
        add(f"blk.{layer}.ffn_down", WIDTH, CHANNELS)
        add(f"blk.{layer}.attn_norm", WIDTH)
        add(f"blk.{layer}.ffn_norm", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_converted_loads_in_both_versions_of_transformers(tmp_path: Path) -> None:
    folder = convert_gguf(write_gguf(tmp_path / "m.gguf"), tmp_path / "model")
    ids = torch.arange(30)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (load_model(folder)(ids) - plain(ids).logits).abs().max() < 1e-5
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 70_000
    assert config["torch_dtype"] == config["dtype"] == "float32"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] != "TokenizersBackend"
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.decode(tokenizer.encode(["abc"])[0].tolist())) == (2, "abc")


def test_a_file_that_lacks_a_tensor_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", without="blk.1.attn_q")
    with pytest.raises(InputError, match=r"missing tensors: model\.layers\.1\.self_attn\.q_proj"):
        convert_gguf(path, tmp_path / "model")
    path = write_gguf(tmp_path / "n.gguf", layers=1)
    with pytest.raises(InputError, match=r"n\.gguf: .*states 1 blocks and holds 2"):
        convert_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_scaled_rotary_positions_are_not_lost(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", extra="rope_freqs")
    with pytest.raises(InputError, match=r"scaled \(rope_freqs\.weight\).*safetensors version"):
        convert_gguf(path, tmp_path / "model")
    path = write_gguf(tmp_path / "n.gguf", scaling="linear")
    with pytest.raises(InputError, match=r"scaled \(llama\.rope\.scaling\.type\)"):
        convert_gguf(path, tmp_path / "model")
    check_gguf(write_gguf(tmp_path / "o.gguf", scaling="none"))


def test_a_part_and_an_unknown_family_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", parts=3, layers=6)
    with pytest.raises(InputError, match=r"one of 3 parts: .*llama-gguf-split --merge"):
        check_gguf(path)
    check_gguf(write_gguf(tmp_path / "m.gguf", parts=1))
    path = write_gguf(tmp_path / "n.gguf", family="gemma2")
    with pytest.raises(InputError, match=r"architecture 'gemma2' is not supported; known .*llama"):
        check_gguf(path)


def test_gguf_files_are_found_by_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[str] = []

    def convert(path: Path, output: Path) -> Path:
        converted.append(path.name)
        return output

    monkeypatch.setattr(sources, "convert_gguf", convert)
    (tmp_path / "one").mkdir()
    path = write_gguf(tmp_path / "one" / "M.GGUF")
    (tmp_path / "one" / "tokenizer").touch()
    resolve_model(path)
    resolve_model(path.parent)
    # What some hubs and programs keep: no suffix, or the config of the original beside it.
    blob = tmp_path / "sha256-0"
    blob.symlink_to(path)
    resolve_model(blob)
    (path.parent / "config.json").write_text("{}")
    resolve_model(path.parent)
    assert converted == ["M.GGUF", "M.GGUF", "sha256-0", "M.GGUF"]
    (path.parent / "model.safetensors").touch()
    assert resolve_model(path.parent) == path.parent
    for other in ("config.json", "tokenizer"):
        with pytest.raises(InputError, match=r"is one file, and no GGUF: name the model's folder"):
            resolve_model(path.parent / other)


@pytest.mark.parametrize("change", [{"layers": 2**31}, {"width": 2**30}, {"context": 2**32 - 1}])
def test_sizes_beyond_all_sense_are_refused_at_once(change: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", **change)
    with pytest.raises(InputError, match=r"m\.gguf: its header is damaged .*llama\..*at most"):
        convert_gguf(path, tmp_path / "model")


def test_a_list_longer_than_the_file_is_refused_at_once(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    content[at : at + 8] = struct.pack("<Q", 2**60)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"the file ends inside it\); fetch the file again"):
        check_gguf(path)
    for damaged in (b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"version https://git-lfs"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.gguf"):
            convert_gguf(path, tmp_path / "model")


def test_a_cache_that_cannot_be_used_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"m\.gguf to .*XDG_CACHE_HOME"):
        resolve_model(path)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match=r"HOME is not set.*XDG_CACHE_HOME"):
        resolve_model(path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_config(resolve_model(path)).hidden_size == WIDTH


def _damage(tmp_path: Path, seeds: range) -> dict[str, int]:
    path = write_gguf(tmp_path / "m.gguf")
    original = path.read_bytes()
    header = original.index(b"blk.1.ffn_norm") + 60
    expected = load_model(convert_gguf(path, tmp_path / "model"))(torch.arange(30)[None])
    counts = {"refused": 0, "read": 0, "other": 0}
    for seed in seeds:
        path.write_bytes(mutate_bytes(original, random.Random(seed), header))
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        started = time.monotonic()
        try:
            folder = convert_gguf(path, tmp_path / "model")
            load_tokenizer(folder)
            found = load_model(folder)(torch.arange(30)[None])
        except InputError as error:
            assert str(path) in str(error) or str(tmp_path / "model") in str(error), seed
            counts["refused"] += 1
        else:
            # Another base or epsilon cannot be told from damage.
            same = torch.equal(found, expected)
            counts["read" if same else "other"] += 1
        assert time.monotonic() - started < 10, seed
    return counts


def test_damaged_headers_are_refused_or_read(tmp_path: Path) -> None:
    counts = _damage(tmp_path, range(12))
    assert counts["refused"] > 5


@pytest.mark.slow
def test_many_damaged_headers_are_refused_or_read(tmp_path: Path) -> None:
    counts = _damage(tmp_path, range(1000, 1400))
    assert counts["refused"] > 200


def test_text_is_tokenized_with_the_tokenizer_of_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same ids and under the same fingerprint as with the model that is made of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "gguf").mkdir()
    file = write_gguf(tmp_path / "gguf" / "tiny.gguf")
    (file.parent / "._tiny.gguf").write_bytes(b"notes")
    converted = load_tokenizer(resolve_model(str(file)))
    for place in (file, file.parent):
        own = load_tokenizer(place)
        assert own.record() == converted.record()
        assert own.decode(own.encode(["the mask"])[0].tolist()) == "the mask"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"its header is damaged .*; fetch the file again"):
        load_tokenizer(file)
