"""Masks of GPT-NeoX against the same masks multiplied into activations."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.trainer.models.cases import NEOX_CASES, check_masked_loss, pair, random_masks
from trainer.models.decoder import CausalLM
from trainer.models.masks import Masks


def _activation_masked_loss(
    model: CausalLM, masks: Masks, ids: Tensor, targets: Tensor, weights: Tensor
) -> Tensor:
    """The loss with every mask multiplied into activations, written without the model's code."""
    config, tensors = model.config, dict(model.named_parameters())
    hidden, layer, head, channel = masks.hidden, masks.layer, masks.head, masks.intermediate
    assert hidden is not None and layer is not None and head is not None and channel is not None
    nonzero = hidden.detach() > 0
    batch, length = ids.shape
    rotated = model.frequencies.numel() * 2
    angles = torch.arange(length)[:, None] * model.frequencies.double()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    approximate = "none" if config.activation == "gelu" else "tanh"

    def norm(x: Tensor, key: str) -> Tensor:
        mean = x[..., nonzero].mean(-1, keepdim=True)
        variance = (x[..., nonzero] - mean).square().mean(-1, keepdim=True)
        normed = (x - mean) * (variance + config.norm_eps).rsqrt()
        return (normed * tensors[f"{key}.weight"] + tensors[f"{key}.bias"]) * hidden

    def linear(x: Tensor, key: str) -> Tensor:
        return F.linear(x, tensors[f"{key}.weight"], tensors.get(f"{key}.bias"))

    def rotate(x: Tensor) -> Tensor:
        a, b, rest = x.split([rotated // 2, rotated // 2, config.head_dim - rotated], -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    x = tensors["gpt_neox.embed_in.weight"][ids] * hidden
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(config.num_layers):
        block = f"gpt_neox.layers.{i}"
        fused = linear(norm(x, f"{block}.input_layernorm"), f"{block}.attention.query_key_value")
        fused = fused.view(batch, length, config.num_heads, 3, config.head_dim)
        q, k, v = rotate(fused[..., 0, :]), rotate(fused[..., 1, :]), fused[..., 2, :]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / config.head_dim**0.5
        context = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -1e30).softmax(-1), v)
        context = (context * head[i][:, None]).flatten(2)
        attended = linear(context, f"{block}.attention.dense") * hidden * layer[i]
        read = x if config.parallel_residual else x + attended
        up = linear(norm(read, f"{block}.post_attention_layernorm"), f"{block}.mlp.dense_h_to_4h")
        activated = F.gelu(up, approximate=approximate) * channel[i]
        fed = linear(activated, f"{block}.mlp.dense_4h_to_h") * hidden * layer[i]
        x = x + attended + fed
    logits = F.linear(norm(x, "gpt_neox.final_layer_norm"), model.head_weight)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


@pytest.mark.parametrize("name", NEOX_CASES)
def test_masked_loss_and_all_gradients_equal_activation_masking(name: str) -> None:
    check_masked_loss(name, _activation_masked_loss)


def test_dimensions_with_mask_0_stay_zero_and_their_weights_do_not_matter() -> None:
    model, _ = pair("gpt_neox")
    masks = random_masks(4)
    assert masks.hidden is not None
    zero = masks.hidden == 0
    ids = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        states = model._hidden_states(ids, masks, masks.stream())
        assert not states[..., zero].any()
        before = model(ids, masks)
        tensors = dict(model.named_parameters())
        tensors["gpt_neox.embed_in.weight"][:, zero] += 100
        tensors["gpt_neox.layers.0.input_layernorm.bias"][zero] += 100
        tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][zero] += 100
        assert torch.equal(model(ids, masks), before)


def test_masks_of_ones_change_only_rounding() -> None:
    model, _ = pair("gpt_neox")
    ones = Masks(torch.ones(48), torch.ones(3), torch.ones(3, 6), torch.ones(3, 80))
    ids = torch.randint(0, 61, (2, 20))
    plain, masked = model(ids), model(ids, ones)
    assert (plain - masked).abs().max() <= 1e-5 * plain.abs().max()
