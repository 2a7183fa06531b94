"""Logits, loss and gradients against transformers, with masks against masked activations."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.trainer.models.cases import (
    CASES,
    LLAMA_CASES,
    check_masked_loss,
    pair,
    random_masks,
    stored_name,
)
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_model
from trainer.models.masks import Masks


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    model, reference = pair(name)
    ids = torch.randint(0, 61, (2, 50))
    ours, theirs = model(ids), reference(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5
    weights = torch.rand(2, 50)
    targets = torch.randint(0, 61, (2, 50))
    output = model(ids, targets=targets, weights=weights)
    output.loss.backward()
    losses = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none")
    (losses * weights.flatten()).sum().backward()
    torch.testing.assert_close(output.token_loss.flatten(), losses, rtol=1e-5, atol=1e-5)
    expected = {stored_name(k, model.config): p for k, p in reference.named_parameters()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-3-rope", "qwen3", "gpt_neox", "gpt_neox-sequential"])
def test_bf16_logits_equal_transformers(name: str) -> None:
    # transformers keeps rotary frequencies in fp32 only if the model is built in bf16.
    model, reference = pair(name, torch.bfloat16)
    ids = torch.randint(0, 61, (2, 50))
    assert torch.equal(model(ids), reference(ids).logits)


def test_sliding_window_hides_old_positions() -> None:
    model, _ = pair("mistral-window")
    ids = torch.randint(0, 61, (1, 50))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 61
    reach = 3 * (7 - 1)  # layers * (window - 1)
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[reach] > 0
    assert torch.equal(difference[reach + 1 :], torch.zeros(50 - reach - 1))


def _activation_masked_loss(
    model: CausalLM, masks: Masks, ids: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """The loss with every mask multiplied into activations, written without the model's code."""
    config, tensors = model.config, dict(model.named_parameters())
    hidden, layer, head, channel = masks.hidden, masks.layer, masks.head, masks.intermediate
    assert hidden is not None and layer is not None and head is not None and channel is not None
    nonzero = hidden.detach() > 0
    batch, length = ids.shape
    half = config.head_dim // 2
    angles = torch.arange(length)[:, None] * model.frequencies.double()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def norm(x: Tensor, key: str) -> Tensor:
        mean = x[..., nonzero].square().mean(-1, keepdim=True)
        return x * (mean + config.norm_eps).rsqrt() * tensors[key] * hidden

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, tensors[f"{key}.weight"], tensors.get(f"{key}.bias"))

    def heads(x: Tensor, key: str, rotary: bool) -> Tensor:
        y = linear(x, f"{key}_proj").view(batch, length, -1, config.head_dim)
        gain = tensors.get(f"{key}_norm.weight")
        if gain is not None:
            y = y * (y.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * gain
        if rotary:
            a, b = y[..., :half], y[..., half:]
            y = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        groups = config.num_heads // y.shape[2]
        return y.repeat_interleave(groups, 2)

    x = tensors["model.embed_tokens.weight"][ids] * hidden
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(config.num_layers):
        block = f"model.layers.{i}"
        normed = norm(x, f"{block}.input_layernorm.weight")
        q, k, v = (heads(normed, f"{block}.self_attn.{n}", n != "v") for n in "qkv")
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / config.head_dim**0.5
        context = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -1e30).softmax(-1), v)
        context = (context * head[i][:, None]).flatten(2)
        x = x + linear(context, f"{block}.self_attn.o_proj") * hidden * layer[i]
        normed = norm(x, f"{block}.post_attention_layernorm.weight")
        up = linear(normed, f"{block}.mlp.up_proj") * channel[i]
        gated = F.silu(linear(normed, f"{block}.mlp.gate_proj")) * up
        x = x + linear(gated, f"{block}.mlp.down_proj") * hidden * layer[i]
    logits = F.linear(norm(x, "model.norm.weight"), model.head_weight)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


@pytest.mark.parametrize("name", sorted(set(LLAMA_CASES) - {"mistral-window"}))
def test_masked_loss_and_all_gradients_equal_activation_masking(name: str) -> None:
    check_masked_loss(name, _activation_masked_loss)


def test_masks_of_ones_change_nothing() -> None:
    model, _ = pair("llama-biases")
    ones = Masks(torch.ones(48), torch.ones(3), torch.ones(3, 6), torch.ones(3, 80))
    ids = torch.randint(0, 61, (2, 20))
    assert torch.equal(model(ids, ones), model(ids))


def test_rounded_masks_are_refused() -> None:
    model, _ = pair("llama")
    with pytest.raises(AssertionError, match=r"layer masks are torch\.bfloat16"):
        model(torch.randint(0, 61, (2, 20)), Masks(layer=torch.ones(3, dtype=torch.bfloat16)))


def test_bf16_model_gives_masks_fp32_gradients_near_the_exact_ones() -> None:
    model, _ = pair("llama")
    masks = random_masks(2)
    ids, targets = torch.randint(0, 61, (2, 4, 30))
    exact = torch.autograd.grad(
        model(ids, masks, targets).loss, list(masks.tensors().values()), retain_graph=False
    )
    model.bfloat16()
    loss = model(ids, masks, targets).loss
    assert loss.dtype == torch.float32
    for gradient, reference in zip(
        torch.autograd.grad(loss, list(masks.tensors().values())), exact, strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.1 * reference.norm()


def test_checkpointed_activations_give_identical_gradients() -> None:
    model, _ = pair("qwen3")
    masks = random_masks(3)
    leaves = [*model.parameters(), *masks.tensors().values()]
    ids, targets = torch.randint(0, 61, (2, 2, 20))
    plain = torch.autograd.grad(model(ids, masks, targets).loss, leaves)
    model.checkpoint_activations = True
    again = torch.autograd.grad(model(ids, masks, targets).loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_weights_rounded_by_a_mixed_precision_policy_are_refused() -> None:
    model, _ = pair("llama")
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(AssertionError, match="cast_forward_inputs"):
        model(ids, targets=ids, weights=torch.ones(1, 4, dtype=torch.bfloat16))


@pytest.mark.slow
def test_logits_equal_transformers_on_a_real_model(real_model: Path) -> None:
    model = load_model(real_model)
    reference = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 200))
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() <= 1e-4
