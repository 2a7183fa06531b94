"""Model folders: read from transformers and written for it, whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from data.errors import InputError
from tests.distributed import run_ranks
from tests.trainer.models.cases import CASES, NEOX_CASES, hf_config, random_masks
from trainer.models import hf
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import (
    check_weights,
    init_weights,
    load_config,
    load_model,
    load_sharded,
    save_model,
)


def _folder(
    name: str, path: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> tuple[Path, Any]:
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(hf_config(name)).to(dtype)
    reference.save_pretrained(path, max_shard_size=shard)
    return path, reference


def _new_model(path: Path) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(load_config(path))
    return model.to_empty(device="cpu")


@pytest.mark.parametrize("name", CASES)
def test_folders_written_by_transformers_load(name: str, tmp_path: Path) -> None:
    path, reference = _folder(name, tmp_path / "model")
    ids = torch.randint(0, 61, (2, 20))
    assert (load_model(path)(ids) - reference(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "name", ["llama-tied-head-dim", "llama-biases", "qwen2", "qwen3", *NEOX_CASES]
)
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_saved_folders_load_in_transformers(
    name: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    model = CausalLM(ModelConfig.from_hf(CASES[name]))
    init_weights(model, std=0.2, seed=3)
    derived = save_model(model.config, model.named_parameters(), tmp_path / "out" / "model")
    files = sorted(file.name for file in (tmp_path / "out" / "model").iterdir())
    assert ("model.safetensors" in files) == (shard_bytes == 10**9)
    assert derived.num_parameters() == model.config.num_parameters()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    ids = torch.randint(0, 61, (2, 20))
    assert (model(ids) - reference(ids).logits).abs().max() <= 1e-5
    assert torch.equal(load_model(tmp_path / "out" / "model")(ids), model(ids))


def test_saving_takes_sizes_from_the_tensors_and_keeps_special_ids(tmp_path: Path) -> None:
    config = ModelConfig.from_hf({**CASES["llama"], "eos_token_id": 5})
    values = CASES["llama"] | {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "eos_token_id": 5,
    }
    small = CausalLM(ModelConfig.from_hf(values))
    derived = save_model(config, small.state_dict(), tmp_path / "model", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {key: written[key] for key in values} == values
    assert (written["dtype"], derived.num_layers, derived.num_heads) == ("bfloat16", 2, 4)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_saving_replaces_a_folder_and_copies_the_tokenizer(tmp_path: Path) -> None:
    model = CausalLM(ModelConfig.from_hf(CASES["llama"]))
    source, target = tmp_path / "source", tmp_path / "model"
    for folder in (source, target):
        folder.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    for name in ("LICENSE", "tekken.json", "additional_chat_templates/tool_use.jinja"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    for name in ("optimizer.pt", "README.md", "params.json", "trainer_state.json", "old/a.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("not copied")
    (target / "stale.txt").write_text("gone afterwards")
    save_model(model.config, model.state_dict(), target, tokenizer_from=source)
    assert sorted(str(file.relative_to(target)) for file in target.rglob("*")) == [
        "LICENSE",
        "additional_chat_templates",
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tekken.json",
        "tokenizer.json",
    ]
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["model", "source"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    model = CausalLM(ModelConfig.from_hf(CASES["llama"]))
    path = tmp_path / "model"
    save_model(model.config, model.state_dict(), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    state = model.state_dict()
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(79, 48)
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight.*\(79, 48\).*\(80, 48\)"):
        save_model(model.config, state, path)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"missing: model\.layers\.1\.mlp\.up_proj"):
        save_model(model.config, state, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    model = CausalLM(ModelConfig.from_hf(CASES["llama"]))
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "shard-7").touch()
    save_model(model.config, model.state_dict(), tmp_path / "model")
    assert [folder.name for folder in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "shard-7").exists()
    expected = (tmp_path / "model" / "config.json").stat().st_mode
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == expected


def test_a_full_disk_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(hf, "save_tensors", refuse)
    model = CausalLM(ModelConfig.from_hf(CASES["llama"]))
    with pytest.raises(InputError, match=r"model: .*No space left.*free space"):
        save_model(model.config, model.state_dict(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_damaged_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    path, _ = _folder("llama", tmp_path / "model")
    weights = path / "model.safetensors"
    state = load_file(weights)
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(InputError, match="cannot read"):
        load_model(path)
    save_file({**state, "model.extra": torch.zeros(1)}, weights)
    with pytest.raises(InputError, match=r"unexpected: model\.extra"):
        load_model(path)
    save_file({**state, "model.norm.weight": torch.zeros(47)}, weights)
    with pytest.raises(InputError, match=r"model.norm.weight has shape \(47,\)"):
        load_model(path)
    weights.unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        load_model(path)
    (path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"/config\.json: model family 'bert' is not supported"):
        load_config(path)
    (path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_config(path)


def test_old_rotary_buffers_and_a_tied_head_in_the_file_are_ignored(tmp_path: Path) -> None:
    path, reference = _folder("qwen2-tied", tmp_path / "model")
    state = load_file(path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path / "model.safetensors")
    ids = torch.randint(0, 61, (1, 9))
    assert (load_model(path)(ids) - reference(ids).logits).abs().max() <= 1e-5


def test_the_buffers_of_published_pythia_files_are_ignored(tmp_path: Path) -> None:
    path, reference = _folder("gpt_neox", tmp_path / "model")
    state = load_file(path / "model.safetensors")
    for layer in range(3):
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool)
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(state, path / "model.safetensors")
    ids = torch.randint(0, 61, (1, 9))
    assert (load_model(path)(ids) - reference(ids).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_an_untied_config_without_a_stored_head_is_refused(name: str, tmp_path: Path) -> None:
    path, _ = _folder(name, tmp_path / "model")
    state = load_file(path / "model.safetensors")
    head = "lm_head.weight" if name == "qwen2" else "embed_out.weight"
    del state[head]
    save_file(state, path / "model.safetensors")
    with pytest.raises(InputError, match=rf"no {head}.*tie_word_embeddings to true"):
        check_weights(path, load_config(path))


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt_neox-sequential"])
def test_a_tied_config_with_another_stored_head_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = _folder(name, tmp_path / "model")
    state = load_file(path / "model.safetensors")
    head = "lm_head.weight" if name == "qwen2-tied" else "embed_out.weight"
    state[head] = reference.get_input_embeddings().weight.detach().clone()
    state[head][-1, -1] += 1
    save_file(state, path / "model.safetensors")
    monkeypatch.setattr(hf, "_COMPARED_ROWS", 7)
    with pytest.raises(InputError, match=rf"{head} other than .*tie_word_embeddings to false"):
        check_weights(path, load_config(path))
    # transformers would not tie them, and so compute something else than a tied model.
    plain = dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
    embedding = next(tensor for key, tensor in plain.items() if "embed" in key)
    assert not torch.equal(plain["lm_head.weight"], embedding)


def test_nothing_is_loaded_from_a_folder_that_does_not_fit(tmp_path: Path) -> None:
    path, _ = _folder("llama", tmp_path / "model", shard="40KB")
    model = _new_model(path)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    last = sorted(path.glob("*.safetensors"))[-1]
    state = load_file(last)
    name = next(key for key, value in state.items() if value.ndim == 2)
    save_file({**state, name: state[name][1:].clone()}, last)
    with pytest.raises(InputError, match="mixes two models"):
        load_sharded(model, path)
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt_neox"])
def test_a_vocabulary_that_was_resized_is_told_from_two_models(name: str, tmp_path: Path) -> None:
    path, _ = _folder(name, tmp_path / "model")
    config = path / "config.json"
    content = json.loads(config.read_text())
    rows = content["vocab_size"]
    config.write_text(json.dumps(content | {"vocab_size": rows - 3}))
    with pytest.raises(InputError, match=f"set vocab_size to {rows} there if the model was"):
        check_weights(path, load_config(path))
    channels = content["intermediate_size"] + 1
    config.write_text(json.dumps(content | {"intermediate_size": channels}))
    with pytest.raises(InputError, match="mixes two models: fetch"):
        check_weights(path, load_config(path))


def _shard(model: CausalLM, policy: MixedPrecisionPolicy, replicas: int = 1) -> None:
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if replicas > 1:
        mesh = init_device_mesh(
            "cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard")
        )
    for layer in model.blocks:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _load_and_step(path: str, replicas: int) -> tuple[bool, float, float, dict[str, Any]]:
    """Load into shards; compare with the whole model; one masked bf16 step."""
    with torch.device("meta"):
        model = CausalLM(load_config(Path(path)))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    _shard(model, policy, replicas)
    model.to_empty(device="cpu")
    load_sharded(model, Path(path))
    whole = load_model(Path(path))
    expected = dict(whole.named_parameters())
    equal = True
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        equal &= torch.equal(parameter.full_tensor(), expected[name])
    ids = torch.arange(40).view(2, 20) % 61
    masks = random_masks(0)
    run = masks.compact(model.config, multiple=4) if model.config.traits.fused_qkv else masks
    output = model(ids, run, ids.roll(-1, 1))
    output.loss.backward()
    whole.bfloat16()
    reference_masks = random_masks(0)
    run = reference_masks.compact(whole.config, multiple=4) if run is not masks else reference_masks
    reference = whole(ids, run, ids.roll(-1, 1))
    reference.loss.backward()
    differences = {}
    for name, z in masks.tensors().items():
        ours, theirs = z.grad, reference_masks.tensors()[name].grad
        assert ours is not None and theirs is not None
        differences[name] = (ours - theirs).abs().max().item()
    return equal, output.loss.item(), reference.loss.item(), differences


@pytest.mark.parametrize(
    ("name", "world", "replicas", "shard"),
    [
        ("llama-tied-head-dim", 3, 1, "5GB"),
        ("qwen3", 4, 2, "40KB"),
        ("qwen2", 1, 1, "40KB"),
        ("gpt_neox", 2, 1, "40KB"),
    ],
)
def test_shards_load_from_bf16_files_and_run_the_masked_step(
    name: str, world: int, replicas: int, shard: str, tmp_path: Path
) -> None:
    path, _ = _folder(name, tmp_path / "model", torch.bfloat16, shard)
    for equal, loss, expected, differences in run_ranks(_load_and_step, world, str(path), replicas):
        assert equal
        assert loss == expected
        assert set(differences) == {"hidden", "layer", "head", "intermediate"}
        assert max(differences.values()) < 1e-6


def _sharded_init() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_hf(CASES["qwen2"]))
    _shard(model, MixedPrecisionPolicy())
    model.to_empty(device="cpu")
    init_weights(model, seed=7)
    tensors = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def test_random_weights_do_not_depend_on_sharding() -> None:
    model = CausalLM(ModelConfig.from_hf(CASES["qwen2"]))
    init_weights(model, seed=7)
    parameters = dict(model.named_parameters())
    for rank_tensors in run_ranks(_sharded_init, 3):
        for name, tensor in rank_tensors.items():
            assert torch.equal(tensor, parameters[name])
    gate = parameters["model.layers.0.mlp.gate_proj.weight"]
    assert 0.019 < gate.std().item() < 0.021 and abs(gate.mean().item()) < 1e-3
    assert not torch.equal(gate, parameters["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(parameters["model.norm.weight"], torch.ones(48))
    assert parameters["model.layers.0.self_attn.q_proj.bias"].abs().max() == 0


@pytest.mark.parametrize("seed", [-1, 2**60, 2**64])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    model = CausalLM(ModelConfig.from_hf(CASES["qwen2"]))
    init_weights(model, seed=seed)
    assert 0.015 < model.get_parameter("model.embed_tokens.weight").std().item() < 0.025
