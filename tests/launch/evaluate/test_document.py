"""Document perplexity: windows cover the text once, and the number equals transformers' own."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from launch.evaluate.document import document_perplexity, resolve_bos, windows
from tests.factories import write_model
from trainer.models.hf import load_model

IDS = [3 + (7 * index * index + 5 * index) % 250 for index in range(151)]
CPU = torch.device("cpu")


@given(length=st.integers(1, 200), window=st.integers(2, 50), stride=st.none() | st.integers(1, 49))
def test_windows_show_every_id_first_exactly_once(
    length: int, window: int, stride: int | None
) -> None:
    if stride is not None and stride >= window:
        stride = window - 1
    cuts = list(windows(length, window, stride))
    first_seen = [position for cut in cuts for position in range(cut.new, cut.end)]
    assert first_seen == list(range(length))
    assert all(cut.begin <= cut.new < cut.end <= cut.begin + window for cut in cuts)


def transformers_nll(folder: Path, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Summed loss and number of targets of (ids, first counted index) rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for row, first in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].double()
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(row[1:]), reduction="none"
        )
        total += losses[first - 1 :].sum().item()
        targets += len(row) - first
    return total, targets


def expected_rows(bos: str, window: int) -> list[tuple[list[int], int]]:
    """Windows side by side, written out for the three rules."""
    if bos == "every":
        size = window - 1
        return [([1, *IDS[i : i + size]], 1) for i in range(0, len(IDS), size)]
    sequence = [1, *IDS] if bos == "yes" else IDS
    rows = [(sequence[i : i + window], 1) for i in range(0, len(sequence), window)]
    return [row for row in rows if len(row[0]) > 1]


@pytest.mark.parametrize("bos", ["no", "yes", "every"])
def test_equals_transformers(tmp_path: Path, bos: str) -> None:
    folder = write_model(tmp_path / "model")
    result = document_perplexity(
        load_model(folder, CPU),
        IDS,
        text_bytes=700,
        bos=bos,
        bos_id=1,
        window=40,
        stride=None,
        batch=2,
        device=CPU,
    )
    nll, targets = transformers_nll(folder, expected_rows(bos, 40))
    assert result.targets == targets
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll / targets), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nll / targets / math.log(2) * 151 / 700, rel=1e-6)


def test_stride_gives_each_target_more_context(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    result = document_perplexity(
        load_model(folder, CPU),
        IDS,
        text_bytes=700,
        bos="no",
        bos_id=None,
        window=40,
        stride=15,
        batch=4,
        device=CPU,
    )
    rows = [(IDS[:40], 1)] + [
        (IDS[begin : begin + 40], 40 - 15) for begin in range(15, len(IDS) - 25, 15)
    ]
    rows = [(row, first) for row, first in rows if len(row) > first]
    nll, targets = transformers_nll(folder, rows)
    assert result.targets == targets == len(IDS) - 1
    assert result.nll == pytest.approx(nll, rel=1e-6)


def test_bos_rule_follows_the_tokenizer() -> None:
    assert resolve_bos("auto", 1, True) == "yes"
    assert resolve_bos("auto", 1, False) == "no"
    assert resolve_bos("auto", None, True) == "no"
    assert resolve_bos("every", 1, False) == "every"
    with pytest.raises(InputError, match="no BOS token"):
        resolve_bos("yes", None, False)


@pytest.mark.parametrize(
    ("ids", "window", "stride", "message"),
    [
        ([5], 8, None, "nothing to predict"),
        (IDS, 1, None, "--window 1"),
        (IDS, 8, 8, "--stride 8"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: Path, ids: list[int], window: int, stride: int | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        document_perplexity(
            load_model(tiny_model, CPU),
            ids,
            text_bytes=10,
            bos="no",
            bos_id=None,
            window=window,
            stride=stride,
            batch=1,
            device=CPU,
        )
