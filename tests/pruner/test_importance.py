from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pruner.config import MaskConfig
from pruner.importance import initial_scores, measure, standardise
from pruner.masks import families
from pruner.shapes import Shape
from tests.distributed import run_ranks
from tests.factories import write_model
from trainer import parallel
from trainer.config import TrainConfig
from trainer.models.hf import load_config
from trainer.run import build_model, pretrained


def sequences(count: int) -> Tensor:
    return torch.randint(0, 259, (count, 12), generator=torch.Generator().manual_seed(2))


def measured(folder: Path, count: int, micro_batch: int = 2) -> dict[str, Tensor]:
    context = parallel.init(threads=1)
    model = build_model(
        load_config(folder), TrainConfig(precision="fp32"), context, load=pretrained(folder)
    )
    return measure(model, sequences(count), context, micro_batch)


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
        cosine = F.cosine_similarity(hidden_states[layer], hidden_states[layer + 1], dim=-1)
        turned = (1 - cosine).mean(-1).sum()
        assert found["layer"][0, layer].item() == pytest.approx(turned.item(), rel=1e-4)


@pytest.mark.parametrize("count", [4, 5])
def test_ranks_share_the_work_and_agree(folder: Path, count: int) -> None:
    (expected,) = run_ranks(measured, 1, folder, count)
    for world, micro_batch in ((2, 1), (3, 2)):
        for found in run_ranks(measured, world, folder, count, micro_batch):
            for name, values in expected.items():
                assert torch.allclose(found[name], values, rtol=1e-5, atol=1e-12), name


def test_standardised_rows() -> None:
    rows = torch.stack([torch.linspace(1, 50, 20).double(), torch.full((20,), 3.0).double()])
    scores = standardise(rows)
    assert scores.dtype == torch.float32
    assert scores.mean(-1).abs().max() < 1e-6
    assert scores[0].square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(scores[1], torch.zeros(20))
    assert torch.isfinite(standardise(torch.tensor([[0.0, 1.0, 2.0]]))).all()


def test_initial_scores_by_rule_and_kind() -> None:
    source = Shape(2, 16, 4, 2, 4, 10)
    members = families(Shape(2, 8, 4, 2, 4, 5), source)
    importance = {"hidden": torch.arange(1, 17).view(1, 16), "intermediate": torch.rand(2, 10) + 1}
    cpu = torch.device("cpu")
    projection = initial_scores(members, MaskConfig(), importance, 0, cpu)
    assert (projection["hidden"].diff() > 0).all()
    assert projection["hidden"].mean().abs() < 1e-6
    paper = MaskConfig(rule="paper", init="importance")
    shifted = initial_scores(members, paper, importance, 0, cpu)
    assert torch.allclose(shifted["hidden"], projection["hidden"] + 2)
    flat = initial_scores(members, MaskConfig(init="flat"), None, 0, cpu)
    assert flat["intermediate"].abs().max() < 0.1 and flat["intermediate"].std() > 0
    published = initial_scores(members, MaskConfig(rule="paper"), None, 0, cpu)
    assert abs(published["hidden"].mean().item() - 5) < 0.02
    again = initial_scores(members, MaskConfig(init="flat"), None, 0, cpu)
    other = initial_scores(members, MaskConfig(init="flat"), None, 1, cpu)
    assert torch.equal(flat["hidden"], again["hidden"])
    assert not torch.equal(flat["hidden"], other["hidden"])
