"""Adapters: what they compute, what is trained beside them, and what they leave as it is."""

from typing import Any

import pytest
import torch
from torch import nn

from data.errors import InputError
from tests.trainer.models.cases import CASES, pair
from tests.trainer.models.test_uneven import uneven
from trainer.adapters import merged_tensors
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM, LossOutput
from trainer.models.lora import (
    Dropout,
    add_adapters,
    init_adapters,
    plain_view,
    targets_of,
    train_last_blocks,
)

MODELS = (
    *("llama", "llama-tied-head-dim", "llama-biases", "mistral-window", "qwen2", "qwen3"),
    *("gpt_neox", "gpt_neox-sequential", "uneven"),
)
IDS = torch.arange(1, 41).view(2, 20)


def model_of(name: str) -> CausalLM:
    return uneven(model_type="llama") if name == "uneven" else pair(name)[0]


def adapted(name: str, targets: tuple[str, ...] = (), **options: Any) -> CausalLM:
    """A model with adapters as they are at the start."""
    model = model_of(name)
    settings: dict[str, Any] = {"rank": 3, "scale": 0.5, "dropout": Dropout(0.0, 0)} | options
    add_adapters(model, targets_of(model.config, targets), **settings)
    init_adapters(model, seed=1)
    return model


def trained_adapters(name: str, **options: Any) -> CausalLM:
    """The same with factors that are not 0."""
    model = adapted(name, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_adapted_models_begin_as_the_models_themselves(name: str) -> None:
    ids = IDS % model_of(name).config.vocab_size
    with torch.no_grad():
        assert torch.equal(adapted(name)(ids), model_of(name)(ids))


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_compute_what_adapters_do(name: str) -> None:
    model = trained_adapters(name)
    ids = IDS % model.config.vocab_size
    merged = CausalLM(model.config)
    merged.load_state_dict(dict(merged_tensors(model)), strict=True)
    with torch.no_grad():
        logits, plain = model(ids), model_of(name)(ids)
        torch.testing.assert_close(merged(ids), logits, rtol=1e-5, atol=1e-5 * logits.abs().max())
    assert (logits - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama-biases", "gpt_neox", "qwen3"])
def test_only_factors_get_gradients(name: str) -> None:
    model = trained_adapters(name)
    output = model(IDS, targets=IDS.roll(-1, 1))
    assert isinstance(output, LossOutput)
    output.loss.backward()
    for own, parameter in model.named_parameters():
        factor = own.endswith((".lora_a", ".lora_b"))
        assert parameter.requires_grad == factor == (parameter.grad is not None), own
        assert not factor or (parameter.grad is not None and bool(parameter.grad.any())), own


def test_modules_that_are_not_asked_for_stay() -> None:
    model = adapted("llama", targets=("q_proj", "down_proj"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trained} == {"q_proj", "down_proj"}
    assert len(trained) == 2 * 2 * 3
    output = model(IDS, targets=IDS)
    assert isinstance(output, LossOutput)
    output.loss.backward()


def test_weights_keep_their_names_and_places() -> None:
    plain, model = model_of("llama"), adapted("llama")
    view = plain_view(model)
    assert list(dict(view.named_parameters())) == list(dict(plain.named_parameters()))
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in view.named_parameters())


def test_unknown_modules_are_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"--target-modules c_attn: .* they have q_proj, k_proj"):
        targets_of(model_of("llama").config, ("q_proj", "c_attn"))
    neox = ModelConfig.from_hf(CASES["gpt_neox"])
    assert targets_of(neox, ("dense",)) == ("dense",)
    assert targets_of(neox, ()) == ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    for wrong in ("lm_head", "embed_tokens", "input_layernorm", "q_norm"):
        with pytest.raises(InputError, match="no such matrix"):
            targets_of(ModelConfig.from_hf(CASES["qwen3"]), (wrong,))


def rows(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    output = model(ids)
    assert isinstance(output, torch.Tensor)
    return output.detach()


def test_dropout_is_a_function_of_step_and_sequence() -> None:
    dropout = Dropout(0.4, seed=3)
    model = trained_adapters("llama", dropout=dropout)
    plain = rows(model, IDS)
    dropout.place = (5, 8)
    whole = rows(model, IDS)
    assert torch.equal(rows(model, IDS), whole) and not torch.allclose(whole, plain)
    dropout.place = (5, 9)
    torch.testing.assert_close(rows(model, IDS[1:]), whole[1:])
    for other in ((6, 8), (5, 9)):
        dropout.place = other
        assert not torch.allclose(rows(model, IDS[:1]), whole[:1])
    dropout.place = None
    assert torch.equal(rows(model, IDS), plain)


def test_dropout_leaves_the_expected_input_as_it_is() -> None:
    dropout = Dropout(0.25, seed=0)
    dropout.place = (0, 0)
    kept = dropout(torch.ones(1, 100, 200), 0)
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert kept.mean() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(kept, dropout(torch.ones(1, 100, 200), 1))


def test_a_block_that_is_computed_again_drops_the_same() -> None:
    gradients = []
    for again in (False, True):
        dropout = Dropout(0.3, seed=0)
        model = trained_adapters("llama", dropout=dropout)
        model.checkpoint_activations = again
        dropout.place = (1, 0)
        output = model(IDS, targets=IDS)
        assert isinstance(output, LossOutput)
        output.loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ["llama", "llama-tied-head-dim", "gpt_neox"])
@pytest.mark.parametrize("head", [True, False])
def test_last_blocks_final_norm_and_head_are_trained(name: str, head: bool) -> None:
    model = model_of(name)
    train_last_blocks(model, 2, head=head)
    names = model.names
    wanted = {n for n, _ in model.named_parameters() if n.startswith(names.final_norm)}
    for index in (1, 2):
        block = f"{names.blocks}.{index}."
        wanted |= {n for n, _ in model.named_parameters() if n.startswith(block)}
    last = names.embedding if model.config.tie_embeddings else names.head
    wanted |= {f"{last}.weight"} if head else set()
    assert trained_names(model) == wanted
    output = model(IDS, targets=IDS)
    assert isinstance(output, LossOutput)
    output.loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == wanted
