"""Fine-tuning on several ranks trains what one process trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.factories import write_tokenizer
from tests.pruner.test_extract import random_model
from tests.trainer.models.test_uneven import save, uneven
from tests.trainer.test_cpt import stop_during
from tests.trainer.test_finetune import METHODS, needs, tune
from tests.trainer.tiny import losses
from trainer.adapters import merged_tensors
from trainer.models.hf import load_model

NEAR: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4}
"""Without an epsilon AdamW makes steps of rounding where gradients are 0."""


def on_ranks(
    workspace: Path, output: Path, changes: dict[str, Any]
) -> tuple[dict[str, np.ndarray], bool]:
    trainer = tune(workspace, output, **changes)
    assert trainer is not None
    return {name: value.numpy() for name, value in merged_tensors(trainer.model)}, trainer.stopping


@pytest.mark.parametrize("method", METHODS)
def test_ranks_and_micro_batches_train_the_same_model(
    method: str, workspace: Path, tmp_path: Path
) -> None:
    """With dropout too, which does not depend on the layout."""
    needs(method)
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {"micro_batch": 1})]
    layouts.append((4, {"replicas": 2, "activation_checkpointing": True}))
    layouts += [(4, {"reshard_after_forward": True})] if method == "lora" else []
    found = []
    for index, (world, layout) in enumerate(layouts):
        output = tmp_path / str(index)
        changes = NEAR | {"method": method} | layout
        found.append(run_ranks(on_ranks, world, workspace, output, changes)[0][0])
        np.testing.assert_allclose(losses(output), losses(tmp_path / "0"), rtol=0, atol=1e-5)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in other.items():
            np.testing.assert_allclose(value, found[0][name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_adapters_go_on_with_another_number_of_ranks(
    before: int, after: int, workspace: Path, tmp_path: Path
) -> None:
    needs("lora")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = NEAR | {"micro_batch": 2}
    expected = run_ranks(on_ranks, 1, workspace, whole, changes)[0][0]
    assert run_ranks(stopped_on_ranks, before, workspace, parts, changes)[0][1]
    found = run_ranks(on_ranks, after, workspace, parts, changes)[0][0]
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=0, atol=1e-5)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)


def stopped_on_ranks(
    workspace: Path, output: Path, changes: dict[str, Any]
) -> tuple[dict[str, np.ndarray], bool]:
    with pytest.MonkeyPatch.context() as patch:
        stop_during(2, patch)
        return on_ranks(workspace, output, changes)


@pytest.mark.parametrize("method", ["lora", "last-blocks"])
@pytest.mark.parametrize("name", ["uneven", "gpt_neox"])
def test_other_shapes_on_two_ranks(name: str, method: str, workspace: Path, tmp_path: Path) -> None:
    """Blocks that lack a layer, fused matrices, a head of its own."""
    needs(method)
    vocabulary: dict[str, Any] = {"vocab_size": 259, "max_position_embeddings": 64}
    kind = {"model_type": "llama" if name == "uneven" else "gpt_neox"} | vocabulary
    save(uneven(**kind) if name == "uneven" else random_model(**kind), tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    changes = NEAR | {"method": method, "model": str(tmp_path / "model"), "lr": 1e-3}
    changes["last_blocks"] = 2
    found = []
    for world in (1, 2):
        output = tmp_path / str(world)
        found.append(run_ranks(on_ranks, world, workspace, output, changes)[0][0])
    np.testing.assert_allclose(losses(tmp_path / "2"), losses(tmp_path / "1"), rtol=0, atol=1e-5)
    start = load_model(tmp_path / "model").state_dict()
    assert any(
        np.abs(value - start[tensor].numpy()).max() > 1e-3 for tensor, value in found[0].items()
    )
    for tensor, value in found[1].items():
        np.testing.assert_allclose(value, found[0][tensor], rtol=0, atol=1e-5, err_msg=tensor)
