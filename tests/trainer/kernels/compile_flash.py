"""Compiles FlashAttention-4 for sm_90 through our call of it, without a GPU; its own process.

Run by test_attention_flash.py with the environment in which it does that. Tensors are fake; only
autograd, which needs a GPU even for fake ones, is replaced by calls of both its passes.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.kernels.attention_flash import LIBRARIES, attend

# Batch, positions, heads, key heads, width of a head, window.
CASES = (
    (2, 4096, 32, 32, 128, None),
    (2, 4096, 32, 8, 128, 1024),
    (1, 1000, 9, 3, 64, None),
    (1, 512, 4, 2, 256, None),
)


class Context(SimpleNamespace):
    """What autograd gives to both passes."""

    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, wanted: bool) -> None:
        assert not wanted


def main() -> None:
    """Prints a line for each case."""
    interface = importlib.import_module("flash_attn.cute.interface")
    (library,) = (entry for entry in LIBRARIES if entry.module == "flash_attn.cute")
    function = interface.FlashAttnFunc
    for batch, length, heads, key_heads, head_dim, window in CASES:
        context = Context()
        function.apply = lambda *given, context=context: function.forward(context, *given)
        with FakeTensorMode():
            query, key, value = (
                torch.empty(
                    (batch, length, count, head_dim),
                    dtype=torch.bfloat16,
                    device="cuda",
                    requires_grad=True,
                )
                for count in (heads, key_heads, key_heads)
            )
            output = attend(library, query, key, value, window, head_dim**-0.5)
            gradients = function.backward(context, torch.empty_like(output), None)
        assert output.shape == query.shape
        for gradient, tensor in zip(gradients, (query, key, value), strict=False):
            assert gradient.shape == tensor.shape
        print(f"compiled {tuple(query.shape)} of {key_heads} key heads, window {window}")


if __name__ == "__main__":
    main()
