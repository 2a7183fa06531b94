"""Scores against their definitions, on any number of ranks, and kept between interruptions."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import InputError
from pruner.shorten import scores
from pruner.shorten.kept import KeptRows
from pruner.shorten.parts import parts_of
from pruner.shorten.scores import Scores
from tests.distributed import run_ranks
from tests.factories import write_model
from trainer import parallel
from trainer.config import TrainConfig
from trainer.models.decoder import CausalLM
from trainer.models.hf import load_config
from trainer.parallel import DistributedContext
from trainer.run import build_model, pretrained

LAYERS = 4
BLOCKS = parts_of("block", LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    return write_model(path, num_hidden_layers=LAYERS, initializer_range=0.3)


def sequences(count: int = 7) -> Tensor:
    return torch.randint(0, 259, (count, 12), generator=torch.Generator().manual_seed(2))


def loaded(folder: Path) -> tuple[CausalLM, DistributedContext]:
    context = parallel.init(threads=1)
    config = TrainConfig(precision="fp32")
    return build_model(load_config(folder), config, context, load=pretrained(folder)), context


def scored(criterion: str, folder: Path, output: Path) -> Scores:
    model, context = loaded(folder)
    ids = sequences()
    if criterion == "ppl":
        return scores.by_perplexity(
            model, BLOCKS, ids, context, 2, KeptRows(output / "a.safetensors", context)
        )
    if criterion == "taylor":
        return scores.by_taylor(model, BLOCKS, ids, context)
    if criterion == "magnitude":
        return scores.by_magnitude(model, BLOCKS, context)
    window, measure = (1, scores.influence) if criterion == "influence" else (2, scores.angle)
    return scores.by_angle(model, BLOCKS, ids, context, 2, window, measure)


@pytest.mark.parametrize("criterion", ["ppl", "taylor", "magnitude", "influence", "angular"])
def test_ranks_share_the_text(criterion: str, folder: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(scored, 1, criterion, folder, tmp_path / "alone")
    assert len(set(alone.values)) >= LAYERS - 1
    for world in (2, 3):
        for found in run_ranks(scored, world, criterion, folder, tmp_path / f"on-{world}"):
            assert found.values == pytest.approx(alone.values, rel=1e-5)
            assert found.order == alone.order
            if alone.intervals is not None:
                own = torch.tensor(found.intervals)
                torch.testing.assert_close(own, torch.tensor(alone.intervals), rtol=1e-4, atol=0)


def test_perplexity_is_that_of_transformers_without_a_block(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = scored("ppl", folder, tmp_path)
    ids = sequences()

    def perplexity(without: int | None) -> float:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        if without is not None:
            del plain.model.layers[without]
        with torch.no_grad():
            logits = plain(ids, use_cache=False).logits[:, :-1]
        return math.exp(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())

    assert found.whole == pytest.approx(perplexity(None), rel=1e-5)
    expected = [perplexity(index) for index in range(LAYERS)]
    assert found.values == pytest.approx(expected, rel=1e-5)
    assert found.intervals is not None
    for value, (low, high) in zip(found.values, found.intervals, strict=True):
        assert low < value < high


def test_taylor_keeps_the_sign_over_the_text(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = sequences()
    logits = plain(ids, use_cache=False).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected, sizes = [0.0] * LAYERS, [0.0] * LAYERS
    for name, weight in plain.named_parameters():
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            assert weight.grad is not None
            expected[index] += (weight * weight.grad).abs().sum().item()
            sizes[index] += weight.abs().sum().item()
    assert scored("taylor", folder, tmp_path).values == pytest.approx(expected, rel=1e-4)
    assert scored("magnitude", folder, tmp_path).values == pytest.approx(sizes, rel=1e-6)
    model, context = loaded(folder)
    scores.by_taylor(model, BLOCKS, ids, context)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_angles_are_those_of_the_stream(folder: Path, tmp_path: Path) -> None:
    model, _ = loaded(folder)
    streams: list[Tensor] = []
    for module in (*model.blocks, model.get_submodule(model.names.final_norm)):
        module.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].double()))
    with torch.no_grad():
        model(sequences())
    for criterion, window in (("influence", 1), ("angular", 2)):
        found = scored(criterion, folder, tmp_path).values
        for first in range(LAYERS):
            if first + window > LAYERS:
                assert found[first] == math.inf
                continue
            cosine = F.cosine_similarity(streams[first], streams[first + window], dim=-1)
            expected = 1 - cosine if window == 1 else cosine.acos() / math.pi
            assert found[first] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_scoring_goes_on_from_what_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = scored("ppl", folder, tmp_path / "straight")
    model, context = loaded(folder)
    original, calls = scores.deletion_losses, []

    def interrupted(*arguments: object) -> Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(scores, "deletion_losses", interrupted)
        kept = KeptRows(tmp_path / "cut" / "a.safetensors", context)
        with pytest.raises(KeyboardInterrupt):
            scores.by_perplexity(model, BLOCKS, sequences(), context, 2, kept)
    again = KeptRows(tmp_path / "cut" / "a.safetensors", context)
    assert again.rows is not None and again.rows.shape == (4, 1 + LAYERS)
    found = scores.by_perplexity(model, BLOCKS, sequences(), context, 2, again)
    assert found.values == straight.values and found.intervals == straight.intervals
    assert KeptRows(tmp_path / "cut" / "b.safetensors", context).rows is None
    again.path.write_bytes(again.path.read_bytes()[:50])
    assert KeptRows(tmp_path / "cut" / "a.safetensors", context).rows is None


def test_losses_that_are_no_number() -> None:
    rows = torch.tensor([[11.0, 22.0, torch.inf, 1.0], [11.0, 11.0, torch.nan, 2e5]]).double()
    found = scores.from_losses(rows, 12, 3)
    # On both texts is worse than on one.
    assert found.order == [0, 2, 1] and found.values[1:] == [math.inf, math.inf]
    assert found.values[0] == pytest.approx(math.exp(1.5))
    rows[0, 0] = torch.nan
    with pytest.raises(InputError, match="the source's loss is not finite"):
        scores.from_losses(rows, 12, 3)


def test_blocks_of_a_source_of_huge_losses_are_told_apart() -> None:
    """Above 700 nats all perplexities are infinite."""
    rows = torch.tensor([[5600.0, 5900.0, 4900.0, 6000.0], [5610.0, 5800.0, 4800.0, 9e9]]).double()
    found = scores.from_losses(rows, 2, 3)
    assert found.order == [1, 0, 2]
    assert found.whole == math.inf and set(found.values) == {math.inf}


def test_baselines() -> None:
    assert scores.by_position(4).order == [3, 2, 1, 0]
    drawn = [scores.by_chance(9, seed).order for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == list(range(9))
