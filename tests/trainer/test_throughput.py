"""Rates from real time, also over a resume, and both conventions of model FLOPs."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.tiny import SHAPE
from trainer.models.decoder import CausalLM
from trainer.models.lora import Dropout, add_adapters, train_last_blocks
from trainer.throughput import Throughput, partial_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("", None),
    ],
)
def test_unknown_devices_have_no_peak(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def make() -> Throughput:
    return Throughput(SHAPE, seq_len=64, device=torch.device("cpu"), world=2)


def test_rates_use_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    throughput = make()
    for seconds in (1.0, 3.0):
        throughput.start_step()
        now[0] += seconds
        assert throughput.end_step(600) == 600 / seconds
        now[0] += 4.0
    summary = throughput.summary()
    assert summary["tokens_per_second"] == 1200 / 4
    assert summary["wall_tokens_per_second"] == 1200 / 12
    assert throughput.mfu() == {}


def test_a_resumed_run_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    first = make()
    first.start_step()
    now[0] += 2.0
    first.end_step(100)
    state: dict[str, Any] = first.state_dict()
    now[0] += 1000.0
    second = make()
    second.load_state_dict(state)
    second.start_step()
    now[0] += 2.0
    second.end_step(100)
    assert second.summary()["tokens_per_second"] == 200 / 4
    assert second.wall_seconds == 4.0


def test_both_conventions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = clock(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    throughput = Throughput(SHAPE, seq_len=64, device=torch.device("cuda", 0), world=2)
    throughput.start_step()
    now[0] += 1.0
    throughput.end_step(1000)
    full, causal = SHAPE.flops_per_token(64, causal=False), SHAPE.flops_per_token(64, causal=True)
    assert full > causal
    assert throughput.mfu() == {
        "mfu_full": pytest.approx(1000 * full / (2 * 989e12)),
        "mfu_causal": pytest.approx(1000 * causal / (2 * 989e12)),
    }
    throughput.recount(lambda causal: 6.0 if causal else 12.0)
    assert throughput.mfu() == {
        "mfu_full": pytest.approx(1000 * 12 / (2 * 989e12)),
        "mfu_causal": pytest.approx(1000 * 6 / (2 * 989e12)),
    }


def test_frozen_weights_cost_less() -> None:
    """Counted by hand for two blocks of 16 x (16 + 8 + 8 + 16) + 3 x 16 x 24 weights."""
    block, head, attention = 16 * 48 + 3 * 16 * 24, 259 * 16, 12 * 16 * 64
    untied = replace(SHAPE, tie_embeddings=False)
    for shape in (SHAPE, untied):
        whole = partial_flops(CausalLM(shape), 64, False)
        assert whole == shape.flops_per_token(64, causal=False)
        assert whole == 6 * (2 * block + head) + 2 * attention
    model = CausalLM(untied)
    train_last_blocks(model, 1, head=True)
    # The first block only computes its output.
    assert partial_flops(model, 64, False) == pytest.approx(whole - 4 * block - 2 / 3 * attention)
    train_last_blocks(model, 1, head=False)
    less = 4 * block + 2 / 3 * attention + 2 * head
    assert partial_flops(model, 64, False) == pytest.approx(whole - less)
    tied = CausalLM(SHAPE)
    train_last_blocks(tied, 1, head=True)
    # The embedding in front of it is trained.
    assert partial_flops(tied, 64, False) == whole - 2 * block
    adapted = CausalLM(SHAPE)
    add_adapters(adapted, ("up_proj",), rank=3, scale=1.0, dropout=Dropout(0.0, 0))
    factors = 2 * 3 * (16 + 24)
    assert partial_flops(adapted, 64, False) == whole - 2 * (2 * block + head) + 6 * factors
