"""Generation comparison: a speed for every model, and the continuation of that model."""

import json
from pathlib import Path
from typing import Any

import torch

from launch.demo.generation import compare_generation
from tests.factories import write_model


def test_models_are_compared_side_by_side(tmp_path: Path) -> None:
    folders = {
        "wide": write_model(tmp_path / "wide"),
        "narrow": write_model(tmp_path / "narrow", hidden_size=16),
    }
    results = compare_generation(folders, prompt="the mask", new_tokens=6, rounds=2)
    assert list(results) == ["wide", "narrow"]
    for row in results.values():
        assert row["tokens_per_second"] > 0
        assert (row["rounds"], row["new_tokens"]) == (2, 6)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, folder in folders.items():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("the mask", return_tensors="pt").input_ids
        output = model.generate(ids, do_sample=False, max_new_tokens=6, repetition_penalty=1.2)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert results[name]["continuation"] == expected


def test_a_model_with_several_ends_and_no_padding_generates(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", eos_token_id=[2, 1], pad_token_id=None)
    results = compare_generation({"model": folder}, prompt="the", new_tokens=4, rounds=1)
    assert results["model"]["tokens_per_second"] > 0


def test_settings_of_a_model_change_nothing(tmp_path: Path) -> None:
    """Beams, stop strings and lengths of its generation_config.json."""
    plain, odd = write_model(tmp_path / "plain"), write_model(tmp_path / "odd")
    settings = {"num_beams": 4, "stop_strings": ["the"], "min_new_tokens": 30, "eos_token_id": 2}
    settings |= {"do_sample": True, "temperature": 0.6, "repetition_penalty": 9.0}
    (odd / "generation_config.json").write_text(json.dumps(settings))
    found = compare_generation(
        {"plain": plain, "odd": odd}, prompt="the mask", new_tokens=6, rounds=1
    )
    assert found["odd"]["continuation"] == found["plain"]["continuation"]
