"""Held-out losses against a direct computation, on any number of ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.errors import InputError
from data.reader import TokenReader
from tests.distributed import run_ranks
from tests.factories import write_model, write_tokens
from tests.trainer.tiny import SHAPE, options
from trainer import parallel
from trainer.evaluate import DomainLoss, evaluate, overall, report
from trainer.models.decoder import CausalLM
from trainer.models.hf import init_weights, load_model
from trainer.run import build_model, random_init

LENGTH = 32


def held_out(workspace: Path) -> TokenReader:
    return TokenReader(workspace / "tokens", LENGTH, split="held_out")


def measure(workspace: Path, batch: int) -> dict[str, DomainLoss]:
    context = parallel.init(threads=1)
    model = build_model(SHAPE, options(), context, load=random_init(1))
    return evaluate(model, held_out(workspace), ["beta", "alpha"], 7, batch, context)


@pytest.mark.parametrize(("world", "batch"), [(1, 3), (2, 2), (3, 4)])
def test_equals_a_direct_computation(workspace: Path, world: int, batch: int) -> None:
    model = CausalLM(SHAPE)
    init_weights(model, seed=1)
    reader = held_out(workspace)
    for losses in run_ranks(measure, world, workspace, batch):
        assert list(losses) == ["beta", "alpha"]
        for domain, result in losses.items():
            ids = torch.from_numpy(reader.read(domain, np.arange(7)))
            logits = model(ids)[:, :-1]
            expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            assert result.tokens == 7 * (LENGTH - 1)
            assert result.loss == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, [1] * 14), (8, [8, 6]), (64, [14])], ids=["1", "8", "64"]
)
def test_no_pass_is_filled_up(workspace: Path, batch: int, expected: list[int]) -> None:
    """The last pass computes what is left, not a whole batch."""
    model = CausalLM(SHAPE)
    init_weights(model, seed=1)
    passed: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    context = parallel.init(threads=1)
    losses = evaluate(model, held_out(workspace), ["beta", "alpha"], 7, batch, context)
    assert passed == expected
    one = evaluate(model, held_out(workspace), ["beta", "alpha"], 7, 1, context)
    for domain, result in losses.items():
        assert result.loss == pytest.approx(one[domain].loss, abs=1e-6)


def test_takes_what_a_small_domain_has(workspace: Path) -> None:
    reader = held_out(workspace)
    context = parallel.init(threads=1)
    model = CausalLM(SHAPE)
    losses = evaluate(model, reader, reader.domains, 10**6, 4, context)
    for domain, size in reader.sizes.items():
        assert losses[domain].tokens == size * (LENGTH - 1)
    assert model.training


def test_unknown_domain(workspace: Path) -> None:
    context = parallel.init(threads=1)
    with pytest.raises(InputError, match=r"'gamma'.*alpha.*beta"):
        evaluate(CausalLM(SHAPE), held_out(workspace), ["gamma"], 1, 1, context)


def test_overall_weighs_tokens() -> None:
    losses = {"a": DomainLoss(1.0, 30), "b": DomainLoss(2.0, 10)}
    assert overall(losses) == DomainLoss(1.25, 40)
    assert report(losses)["a"] == {"loss": 1.0, "perplexity": pytest.approx(np.e), "tokens": 30}
    for nats in (701.0, 1e9):
        broken = DomainLoss(nats, 1)
        assert broken.perplexity == float("inf")
        assert report({"a": broken})["a"]["perplexity"] is None


def test_a_loss_that_is_no_number_is_that_of_its_domain(tmp_path: Path) -> None:
    model_folder = write_model(tmp_path / "model", tie_word_embeddings=False)
    data = write_tokens(tmp_path / "tokens", model_folder)
    model = load_model(model_folder)
    reader = TokenReader(data, 32)
    used = [set(reader.read(d, np.arange(2)).flatten().tolist()) for d in ("alpha", "beta")]
    with torch.no_grad():
        rows = sorted(used[1] - used[0])
        model.get_submodule(model.names.embedding).get_parameter("weight")[rows] = torch.nan
    assert rows
    found = evaluate(model, reader, ["alpha", "beta"], 2, 4, parallel.init(threads=1))
    assert math.isfinite(found["alpha"].loss) and math.isnan(found["beta"].loss)
