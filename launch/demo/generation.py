"""Generation speed and continuations with plain transformers, several models side by side."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from data.progress import Progress


def silence_transformers() -> None:
    """Turns off transformers' own progress bars, which would cut through the output."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_for_generation(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) through transformers alone, fp32 on the CPU or bf16 on a GPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silence_transformers()
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model.eval().to("cuda" if on_gpu else "cpu"), tokenizer


def compare_generation(
    folders: dict[str, Path], *, prompt: str, new_tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Tokens/s and a continuation of `prompt` for every model folder.

    Speed: greedy, batch 1, with KV cache, `new_tokens` generated tokens over the wall time of the
    whole call (prompt included); the models alternate in one process, so that load on the machine
    meets all alike, and the median of `rounds` is reported after one untimed round. The
    continuation is greedy with a repetition penalty of 1.2.
    """
    models = {name: load_for_generation(folder) for name, folder in folders.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with Progress("generate", total=(rounds + 1) * len(models), unit="run") as bar:
        for round_number in range(rounds + 1):
            for name, (model, tokenizer) in models.items():
                seconds = _timed(model, tokenizer, prompt, new_tokens)
                if round_number > 0:
                    times[name].append(seconds)
                bar.update(1, model=name)
    return {
        name: {
            "tokens_per_second": new_tokens / statistics.median(times[name]),
            "rounds": rounds,
            "seconds": times[name],
            "new_tokens": new_tokens,
            "threads": torch.get_num_threads(),
            "continuation": _continue(model, tokenizer, prompt, new_tokens),
        }
        for name, (model, tokenizer) in models.items()
    }


def _timed(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> float:
    """Seconds of one greedy generation of exactly `new_tokens` tokens."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    output = _generate(model, inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    synchronize()
    assert output.shape[1] - inputs["input_ids"].shape[1] == new_tokens
    return time.perf_counter() - start


def _continue(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = _generate(model, inputs, max_new_tokens=new_tokens, repetition_penalty=1.2)
    text: str = tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text


def _generate(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
    """Greedy, by nothing of the model's own settings but the tokens that end a text."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    padding = model.generation_config.pad_token_id
    if padding is None:
        padding = ends[0] if isinstance(ends, list) else ends
    # Those of the model, such as beams or stop strings, would fill in what is left open.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=padding)
    with torch.inference_mode():
        output: torch.Tensor = model.generate(**inputs, do_sample=False, **options)
    return output
