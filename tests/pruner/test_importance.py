"""Measured importance against transformers and finite differences, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pruner.importance import (
    REPLICATES,
    in_doubt,
    measure,
    position_shares,
    replicate_counts,
)
from pruner.shapes import shape_of
from pruner.units import UnitKind, to_masks
from tests.distributed import run_ranks
from tests.factories import write_model
from trainer import parallel
from trainer.config import TrainConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config
from trainer.models.masks import Masks
from trainer.run import build_model, pretrained


def sequences(count: int) -> Tensor:
    return torch.randint(0, 259, (count, 12), generator=torch.Generator().manual_seed(2))


def replicated(
    folder: Path, count: int, micro_batch: int = 2, kind: str = "importance"
) -> dict[str, Tensor]:
    context = parallel.init(threads=1)
    model = build_model(
        load_config(folder), TrainConfig(precision="fp32"), context, load=pretrained(folder)
    )
    found = measure(kind, model, sequences(count), context, micro_batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def measured(folder: Path, count: int, **options: Any) -> dict[str, Tensor]:
    """On the calibration set itself."""
    return {name: values[0] for name, values in replicated(folder, count, **options).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", num_hidden_layers=3)


def test_importance_matches_activations_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        if name.endswith(("q_proj", "gate_proj", "o_proj", "down_proj")):
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.__setitem__(name, x[0].detach())
            )
    ids = sequences(5)
    with torch.no_grad():
        hidden_states = plain(ids, output_hidden_states=True).hidden_states
    strength = {name: x.abs().mean(1).square().sum(0).double() for name, x in inputs.items()}
    found = measured(folder, 5)

    readers = [v for name, v in strength.items() if name.endswith(("q_proj", "gate_proj"))]
    assert torch.allclose(found["hidden"][0], torch.stack(readers).sum(0), rtol=1e-4)
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        channels = strength[f"{prefix}.mlp.down_proj"]
        assert torch.allclose(found["intermediate"][layer], channels, rtol=1e-4)
        heads = strength[f"{prefix}.self_attn.o_proj"].view(2, 2, 8).sum(-1)
        own = found["query_head"][layer * 2 : layer * 2 + 2]
        assert torch.allclose(own, heads, rtol=1e-4)
        assert torch.allclose(found["kv_group"][layer], heads.sum(-1), rtol=1e-4)
    # The last hidden state that transformers returns is behind the final norm.
    for layer in range(2):
        pair = (hidden_states[layer], hidden_states[layer + 1])
        cosine = F.cosine_similarity(*pair, dim=-1)
        change = (1 - cosine).mean(-1).sum()
        assert found["layer"][0, layer].item() == pytest.approx(change.item(), rel=1e-4)


def mean_loss(model: CausalLM, ids: Tensor, masks: Masks) -> float:
    """Mean loss per target token of one sequence [1, S] in the model's precision."""
    log_probabilities = F.log_softmax(model(ids, masks=masks)[0, :-1], dim=-1)
    return F.nll_loss(log_probabilities, ids[0, 1:]).item()


def test_taylor_matches_finite_differences(folder: Path) -> None:
    """Each unit's mask is moved up and down alone, on a plain model in fp64."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = CausalLM(load_config(folder)).double().eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    source, step, count = shape_of(model.config), 1e-6, 2
    found = measured(folder, count, kind="taylor")
    chosen = {
        "hidden": [(0, 3), (0, 31)],
        "layer": [(0, 0), (0, 2)],
        "kv_group": [(0, 0), (2, 1)],
        "query_head": [(0, 1), (5, 0)],
        "intermediate": [(0, 7), (2, 47)],
    }
    with torch.no_grad():
        for name, units in chosen.items():
            for unit in units:
                slopes = []
                for ids in sequences(count).split(1):
                    losses = []
                    for change in (step, -step):
                        z = torch.ones(found[name].shape, dtype=torch.float64)
                        z[unit] += change
                        losses.append(mean_loss(model, ids, to_masks({name: z}, source)))
                    slopes.append(abs(losses[0] - losses[1]) / (2 * step))
                expected = sum(slopes) / count
                assert found[name][unit].item() == pytest.approx(expected, rel=1e-3, abs=1e-7), name


def norm(*parts: Tensor) -> float:
    return torch.cat([part.flatten() for part in parts]).norm().item()


@pytest.mark.parametrize("tied", [True, False])
def test_magnitudes_are_norms_of_what_removal_would_remove(tmp_path: Path, tied: bool) -> None:
    folder = write_model(tmp_path / "model", tie_word_embeddings=tied)
    found = measured(folder, 1, kind="magnitude")
    tensors = {
        name: tensor.double()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if tensor.ndim == 2
    }
    writers = ("o_proj.weight", "down_proj.weight")
    for dim in (0, 31):
        parts = [
            tensor[dim] if name.endswith(writers) else tensor[:, dim]
            for name, tensor in tensors.items()
        ]
        assert len(parts) == 2 * 7 + (1 if tied else 2)
        assert found["hidden"][0, dim].item() == pytest.approx(norm(*parts))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        own = {n.split(".")[-2]: m for n, m in tensors.items() if n.startswith(prefix)}
        gate, up, down = (own[f"{name}_proj"] for name in ("gate", "up", "down"))
        query, key, value, output = (own[f"{name}_proj"] for name in "qkvo")
        assert found["layer"][0, layer].item() == pytest.approx(norm(*own.values()))
        for channel in (0, 47):
            expected = norm(gate[channel], up[channel], down[:, channel])
            assert found["intermediate"][layer, channel].item() == pytest.approx(expected)
        for group in range(2):
            rows, queries = slice(group * 8, group * 8 + 8), slice(group * 16, group * 16 + 16)
            expected = norm(query[queries], key[rows], value[rows], output[:, queries])
            assert found["kv_group"][layer, group].item() == pytest.approx(expected)
        for head in range(4):
            rows = slice(head * 8, head * 8 + 8)
            own_head = found["query_head"].view(2, 4)[layer, head]
            assert own_head.item() == pytest.approx(norm(query[rows], output[:, rows]))


@pytest.mark.parametrize(
    ("kind", "count"), [("importance", 4), ("importance", 5), ("taylor", 5), ("magnitude", 1)]
)
def test_ranks_share_the_work_and_agree(folder: Path, kind: str, count: int) -> None:
    (expected,) = run_ranks(replicated, 1, folder, count, 2, kind)
    assert set(expected) == {"hidden", "layer", "kv_group", "query_head", "intermediate"}
    for world, micro_batch in ((2, 1), (3, 2)):
        first, *others = run_ranks(replicated, world, folder, count, micro_batch, kind)
        for name, values in expected.items():
            assert torch.allclose(first[name], values, rtol=2e-5, atol=1e-8), name
            assert all(torch.equal(first[name], other[name]) for other in others), name


def test_the_first_position_counts_in_long_sequences_too() -> None:
    for length in (1, 12, 256, 4096):
        shares = position_shares(length, torch.device("cpu"))
        assert float(shares[0]) == pytest.approx(max(1 / length, 1 / 256))
        assert float(shares.sum()) == pytest.approx(1, rel=1e-5)
        assert length < 3 or float(shares[1:].max() - shares[1:].min()) == 0


def test_gpt_neox_is_measured_by_all_means(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = GPTNeoXConfig(vocab_size=259, num_hidden_layers=2, **sizes)
    plain = GPTNeoXForCausalLM(config).eval()
    plain.save_pretrained(tmp_path)
    block = plain.gpt_neox.layers[1]
    inputs: list[Tensor] = []
    for module in (block.attention.dense, block.mlp.dense_4h_to_h):
        module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    with torch.no_grad():
        plain(sequences(3))
    heads, channels = (x.abs().mean(1).square().sum(0).double() for x in inputs)
    found = measured(tmp_path, 3)
    assert torch.allclose(found["kv_group"][1], heads.view(4, 8).sum(-1), rtol=1e-4)
    assert torch.allclose(found["intermediate"][1], channels, rtol=1e-4)
    found = measured(tmp_path, 1, kind="magnitude")
    fused, output = block.attention.query_key_value.weight, block.attention.dense.weight
    expected = norm(fused.detach()[24:48], output.detach()[:, 8:16])
    assert found["kv_group"][1, 1].item() == pytest.approx(expected, rel=1e-5)
    taylor = measured(tmp_path, 2, kind="taylor")
    assert all(bool((values > 0).all()) for values in taylor.values())


@pytest.mark.parametrize("kind", ["importance", "taylor"])
def test_replicates_are_sums_over_sequences_drawn_again(folder: Path, kind: str) -> None:
    """Against the importance of each sequence alone, which adds up."""
    found = replicated(folder, 5, kind=kind)
    counts = replicate_counts(5)
    assert counts.shape == (5, 1 + REPLICATES) and bool((counts[:, 0] == 1).all())
    assert 0.8 < float(counts[:, 1:].mean()) < 1.2 and float(counts[:, 1:].max()) > 1
    context = parallel.init(threads=1)
    model = build_model(
        load_config(folder), TrainConfig(precision="fp32"), context, load=pretrained(folder)
    )
    parts = [measure(kind, model, ids, context, 1) for ids in sequences(5).split(1)]
    for name, values in found.items():
        each = torch.stack([part[name][0] for part in parts])
        expected = torch.tensordot(counts.t(), each, dims=1) / (5 if kind == "taylor" else 1)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-9)


def test_units_that_chance_decides_are_in_doubt() -> None:
    kinds = {"intermediate": UnitKind("intermediate", 2, 4, 2)}
    values = torch.tensor([[4.0, 3.0, 1.0, 0.5], [4.0, 2.0, 2.0, 1.0]]).repeat(1 + REPLICATES, 1, 1)
    # In row 1, units 1 and 2 change places in a quarter of the replicates; unit 3 once only.
    values[1 : 1 + REPLICATES // 4, 1, 1] = 1.5
    values[-1, 1, 3] = 2.5
    assert in_doubt({"intermediate": values}, kinds) == {"intermediate": 2}
    assert in_doubt({"intermediate": values[:1]}, kinds) == {}
