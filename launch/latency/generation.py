"""One generation by plain transformers, timed."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.models.hf import load_config

SEED = 0
"""Of the prompts, which are drawn: how long a token takes does not depend on which it is."""


class Times(NamedTuple):
    """Seconds of one generation."""

    first: float
    """Until the first new token is known: the prompt is read in them."""
    total: float
    """Until the last one is."""


class Generator:
    """A model that generates `new` tokens behind a prompt of `inputs`, greedily.

    Args:
        folder: its Hugging Face folder.
        device: where it runs.
        dtype: of its weights.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        # Makes models of uneven blocks known to transformers.
        self.vocab_size = load_config(folder).vocab_size
        self.device = device
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False
        )
        self.model = loaded.to(device).eval()
        # Nothing of the model's own: no sampling, and no token that would end a sequence.
        self.model.generation_config = GenerationConfig()

    def prompts(self, batch: int, inputs: int) -> Tensor:
        """Random ids [batch, inputs], the same for every model of as many ids."""
        draw = torch.Generator().manual_seed(SEED)
        ids = torch.randint(0, self.vocab_size, (batch, inputs), generator=draw)
        return ids.to(self.device)

    @torch.inference_mode()
    def generate(self, ids: Tensor, new: int) -> Times:
        """Times of `new` tokens behind each of `ids` [B, S]."""
        from transformers import GenerationConfig, StoppingCriteriaList

        clock = _Clock(self.device)
        config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0
        )
        self._wait()
        start = time.perf_counter()
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        self._wait()
        total = time.perf_counter() - start
        assert found.shape[1] == ids.shape[1] + new, found.shape
        assert clock.first is not None
        return Times(clock.first - start, total)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Clock:
    """Asked by transformers after every token whether to stop; notes when the first one came."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first: float | None = None

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.first is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.first = time.perf_counter()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
