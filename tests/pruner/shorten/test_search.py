"""The search finds the best set, on any number of ranks, and goes on from what it knows."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pruner.divergence import PARTS, Divergence
from pruner.evolution import evolve
from pruner.shorten.parts import Part, without
from pruner.shorten.search import Removed, exchanged
from tests.distributed import run_ranks
from tests.factories import write_model
from tests.pruner.shorten.test_scores import loaded, sequences

LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    return write_model(path, num_hidden_layers=LAYERS, initializer_range=0.3)


class Measured(Divergence):
    """Of the model without blocks."""

    def without(self, removed: Removed, parts: int = PARTS) -> float:
        name = ",".join(map(str, removed))
        gone = [Part("layer", index) for index in removed]
        masks = lambda: without(gone, self.model.config, self.context.device)  # noqa: E731
        return self.of(name, masks, parts)


def divergence(folder: Path, output: Path) -> Measured:
    model, context = loaded(folder)
    return Measured(model, sequences(20), context, 2, output / "scores" / "a.json")


def search(folder: Path, output: Path, generations: int = 6) -> dict[str, Any]:
    measured = divergence(folder, output)
    start = (0, 1)
    options: dict[str, Any] = {"generations": generations, "offspring": 4, "seed": 1}
    near = partial(exchanged, order=range(5))
    found = evolve(measured.without, start, near, keep=measured.keep, **options)
    return {
        "found": found,
        "start": measured.without(start),
        "end": measured.without(found),
        "known": measured.known,
        "computed": measured.computed,
    }


def test_divergence_is_that_of_the_logits(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    measured = divergence(folder, tmp_path)
    ids = sequences(20)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        whole = plain(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        del plain.model.layers[3], plain.model.layers[1]
        cut = plain(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    per_token = F.kl_div(cut, whole, log_target=True, reduction="none").sum(-1)
    assert measured.without((1, 3)) == pytest.approx(per_token.mean().item(), rel=1e-4)
    # 20 sequences make ten parts of two.
    assert measured.without((1, 3), 3) == pytest.approx(per_token[:6].mean().item(), rel=1e-4)
    assert measured.without(()) == pytest.approx(0, abs=1e-5)
    assert measured.computed == 40


def test_the_best_set_is_found(folder: Path, tmp_path: Path) -> None:
    found = search(folder, tmp_path / "search", generations=12)
    measured = divergence(folder, tmp_path / "all")
    sets = {pair: measured.without(pair) for pair in itertools.combinations(range(5), 2)}
    best = min(sets, key=lambda pair: sets[pair])
    assert best != (0, 1) and found["found"] == best
    assert found["end"] < found["start"]
    # Most sets are read in part only.
    assert found["computed"] < 20 * len(found["known"])


def test_ranks_find_the_same(folder: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(search, 1, folder, tmp_path / "alone")
    for found in run_ranks(search, 2, folder, tmp_path / "two"):
        assert found["found"] == alone["found"]
        assert found["end"] == pytest.approx(alone["end"], rel=1e-5)


def test_what_is_known_is_not_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = search(folder, tmp_path / "straight")
    search(folder, tmp_path / "cut", generations=3)
    original, calls = Divergence._measure, []

    def counted(self: Divergence, masks: Any, number: int) -> float:
        calls.append(number)
        return original(self, masks, number)

    monkeypatch.setattr(Divergence, "_measure", counted)
    again = search(folder, tmp_path / "cut")
    assert again == straight and len(calls) > 0
    calls.clear()
    assert search(folder, tmp_path / "cut") == straight and calls == []
    kept = tmp_path / "cut" / "scores" / "a.json"
    kept.write_text('{"1,2": "no"}')
    assert search(folder, tmp_path / "cut") == straight and calls


def test_exchanges_keep_the_number_and_what_is_protected() -> None:
    import random

    parent = (1, 2, 5)
    seen = set()
    for seed in range(200):
        child = exchanged(parent, random.Random(seed), range(1, 7))
        assert len(child) == 3 and set(child) <= set(range(1, 7)) and list(child) == sorted(child)
        seen.add(len(set(child) - set(parent)))
    assert seen == {1, 2}
    assert exchanged((1, 2), random.Random(0), [1, 2, 3]) in ((1, 3), (2, 3))


def test_the_least_score_goes_and_the_largest_comes_back_most_often() -> None:
    import random
    from collections import Counter

    order = [4, 2, 0, 5, 1, 3]
    gone, back = Counter[int](), Counter[int]()
    for seed in range(2000):
        child = exchanged((0, 2, 3), random.Random(seed), order)
        if len(set(child) - {0, 2, 3}) == 1:
            gone.update(set(child) - {0, 2, 3})
            back.update({0, 2, 3} - set(child))
    # The weights are 1, 1/2 and 1/3.
    for counts, wanted in ((gone, (4, 5, 1)), (back, (3, 0, 2))):
        total = counts.total()
        for index, share in zip(wanted, (6 / 11, 3 / 11, 2 / 11), strict=True):
            assert counts[index] / total == pytest.approx(share, abs=0.04)


def test_nothing_is_left_to_exchange(folder: Path, tmp_path: Path) -> None:
    measured = divergence(folder, tmp_path)
    options: dict[str, Any] = {"generations": 3, "offspring": 4, "seed": 0, "keep": measured.keep}
    assert evolve(measured.without, (1, 2), partial(exchanged, order=[1, 2]), **options) == (1, 2)
    assert not measured.known
