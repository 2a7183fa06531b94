"""llama.cpp on this machine's CPU, through the package xllamacpp, which carries its server."""

import json
import urllib.request
from pathlib import Path
from typing import Any

from data.errors import InputError

CONTEXT = 512
"""Positions that a loaded model gets."""
_SECONDS = 600


class LlamaCpp:
    """A GGUF file, loaded. Raises InputError, which names it as it is `called`, where llama.cpp
    refuses it."""

    def __init__(self, path: Path, threads: int, called: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = CONTEXT, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity = False, -1
        try:
            self._server = xllamacpp.Server(params)
        # The package raises what its C++ happens to throw.
        except Exception as error:
            raise InputError(
                f"{called}: llama.cpp cannot load it ({error}). A byte-level tokenizer without "
                "merges is one reason; --check tensors writes the file without asking"
            ) from None

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, in which special tokens are plain characters."""
        asked = {"content": text, "add_special": False, "parse_special": False}
        return [int(token) for token in self._ask("tokenize", asked)["tokens"]]

    def next_token(self, ids: list[int], *, top: int) -> dict[int, float]:
        """Logarithms of the `top` highest probabilities of what follows `ids`, by id and the
        highest first; empty where the first is a part of a character, of which the server says
        nothing."""
        asked: dict[str, Any] = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": top}
        found = self._ask("completion", asked).get("completion_probabilities", [])
        return {int(one["id"]): one["logprob"] for one in found[0]["top_logprobs"]} if found else {}

    def _ask(self, what: str, content: dict[str, Any]) -> dict[str, Any]:
        # Of this process, on the loopback address alone.
        request = urllib.request.Request(
            f"{self._server.listening_address}/{what}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
