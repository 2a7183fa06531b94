"""The ridge regressions of a refit: their sums over tokens, and which tokens are among them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.parallel import DistributedContext

LOST = 0.25
"""Part of the first position's squares that may be missing."""
MASSIVE = 10.0
"""How much more than everywhere else together may be missing there before it governs a fit."""


class Ridge:
    """The normal equations of matrices that share their inputs; fp64, summed over ranks.

    With a bias, a column of ones that costs nothing stands behind the inputs.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.rows = [linear.weight.shape[0] for linear in linears]
        self.biased = linears[0].bias is not None
        weight = linears[0].weight
        inputs, outputs = weight.shape[1] + self.biased, sum(self.rows)
        self.gram = self._zeros(weight, inputs, inputs)
        """[in, in]"""
        self.moment = self._zeros(weight, inputs, outputs)
        """[in, all outputs]"""
        self.first: list[tuple[Tensor, Tensor]] = []
        """Inputs and residuals of the first position of each sequence, which wait."""
        self.with_first = False
        """Whether these are among the sums."""

    def _zeros(self, like: Tensor, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=like.device)

    def add(self, inputs: Tensor, residual: Tensor) -> None:
        """Adds tokens: inputs [B, S, in] and what is missing from the outputs [B, S, all outputs].
        Those of the first position wait for `add_first`."""
        self.first.append((inputs[:, 0], residual[:, 0]))
        self._add(inputs[:, 1:].flatten(0, 1), residual[:, 1:].flatten(0, 1))

    def add_first(self) -> None:
        """Adds the tokens of the first position. Channels that are massive there then do not enter
        the penalty, which they would govern."""
        self.with_first = True
        if self.first:
            inputs, residuals = zip(*self.first, strict=True)
            self._add(torch.cat(inputs), torch.cat(residuals))

    def _add(self, inputs: Tensor, residual: Tensor) -> None:
        dtype = inputs.dtype
        # Sums over tokens in less than fp32 would be wrong by as much as the penalty.
        inputs, residual = inputs.float(), residual.float()
        if self.biased:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        with _factors_in(dtype):
            self.gram += (inputs.t() @ inputs).double()
            self.moment += (inputs.t() @ residual).double()

    def solve(
        self, ridge: float, context: DistributedContext
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The change of each matrix's weight [out, in] and bias [out] in fp64; collective, equal on
        every rank."""
        context.all_reduce_sum(self.gram)
        context.all_reduce_sum(self.moment)
        diagonal = self.gram.diagonal()
        size = len(diagonal) - self.biased
        # A dimension that is 0 everywhere must not make the matrix singular.
        squares = diagonal[:size]
        penalty = ridge * float(typical(squares) if self.with_first else squares.mean()) or 1.0
        diagonal[:size] += penalty
        if self.biased:
            diagonal[size:] += 1e-9 * penalty
        factor, failed = torch.linalg.cholesky_ex(self.gram)
        while failed:
            # Less than the rounding of the fp32 products that were summed.
            diagonal[:size] += 9 * penalty
            penalty *= 10
            factor, failed = torch.linalg.cholesky_ex(self.gram)
        change = torch.cholesky_solve(self.moment, factor).t()
        parts = change.split(self.rows)
        return [(part[:, :size], part[:, size] if self.biased else None) for part in parts]


def typical(squares: Tensor) -> Tensor:
    """Mean of `squares` [n] without the largest 2%."""
    return squares.sort().values[: len(squares) - len(squares) // 50].mean()


@contextmanager
def _factors_in(dtype: torch.dtype) -> Iterator[None]:
    """Lets fp32 products read their factors in bf16, of which nothing is lost if `dtype` is bf16;
    sums stay fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Apart:
    """How far the pruned model's stream is from the source's, at the first position and elsewhere.

    The block that writes a massive stream at the first position may be removed. Blocks in front of
    it can only be bent to do it by half, and all later ones would mend that instead of anything
    else. So where most of that stream is missing, the first position is left out of the fit.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)
        """Squares over fitted tokens: missing and wanted at the first position, missing
        elsewhere."""

    def add(self, wanted: Tensor, missing: Tensor) -> None:
        """Adds a batch: the source's stream [B, S, d'] and what the pruned model's lacks of it."""
        parts = (missing[:, 0], wanted[:, 0], missing[:, 1:])
        squares = [part.square().sum(dtype=torch.float64) for part in parts]
        self.sums += torch.stack(squares).cpu()

    def lost(self, context: DistributedContext) -> bool:
        """Whether the stream of the first position is lost; collective, the same on every rank."""
        sums = context.all_reduce_sum(self.sums.to(context.device))
        missing, wanted, elsewhere = sums.tolist()
        return bool(missing > LOST * wanted and missing > MASSIVE * elsewhere)
