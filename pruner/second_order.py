"""Importance of heads and channels that knows the others: what a removal costs once those that stay
have made up for it.

For a writing matrix W [d, n] with inputs X [t, n], H = X^T X + damping: without the columns of a
unit u, and with the other columns refitted, the squared error of X W^T grows by
tr(W_u ((H^-1)_uu)^-1 W_u^T) (optimal brain surgeon; in blocks as in ZipLM, arXiv 2302.04089,
section 3). Units are removed one after the other, the cheapest first; a unit's importance is the
error once it is gone too. Hidden dimensions and blocks are measured by their activations.
"""

from typing import Any

import torch
from torch import Tensor

from data.progress import Progress
from pruner.importance import ActivationStatistics, calibration_batches, position_shares
from pruner.shapes import Shape, shape_of
from trainer.models.decoder import CausalLM
from trainer.models.families import Role
from trainer.parallel import DistributedContext, full_tensor, reshard

DAMPING = 0.01
"""Added to the diagonal of the inputs' products, relative to its mean."""
PANEL = 64
"""Channels that are removed between two updates of whole matrices."""


class WriterInputs:
    """Forward hooks that sum the outer products of what the writing matrices get, the first
    position of each sequence left out; use as a context manager.

    `weights` [B] says how much each sequence of the next forward pass counts (0 for padding). Every
    rank holds [n, n] in fp32 for every matrix: 17.7 GB for LLaMA-2-7B.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.weights = torch.ones(0)
        self.products: dict[tuple[int, Role], Tensor] = {}
        """By block and role, [n, n] fp32."""
        self._handles: list[Any] = []

    def __enter__(self) -> "WriterInputs":
        for index, block in enumerate(self.model.blocks):
            for role in (Role.ATTENTION_OUTPUT, Role.FEED_FORWARD_OUTPUT):
                module = block.get_submodule(self.model.names.with_role(role))
                hook = self._hook((index, role))
                self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, key: tuple[int, Role]) -> Any:
        def add(_: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().float() * self.weights[:, None, None].float()
            shares = x.shape[1] * position_shares(x.shape[1], x.device)
            x = (x * shares.sqrt()[:, None]).flatten(0, -2)
            if key in self.products:
                self.products[key].addmm_(x.t(), x)
            else:
                self.products[key] = x.t() @ x

        return add


@torch.no_grad()
def second_order(
    model: CausalLM, sequences: Tensor, context: DistributedContext, micro_batch: int
) -> dict[str, Tensor]:
    """Importance of the units of all kinds, as pruner.importance.measure; collective."""
    with ActivationStatistics(model, 1) as statistics, WriterInputs(model) as inputs:
        for weights, ids in calibration_batches(
            sequences, context, micro_batch, "measure importance"
        ):
            statistics.weights, inputs.weights = weights[:, None], weights
            model(ids, targets=ids, weights=torch.zeros(ids.shape, device=ids.device))
        found = statistics.reduce(context)
    reshard(model)
    errors = _errors(model, inputs, context)
    shape = shape_of(model.config)
    for name in ("kv_group", "query_head", "intermediate"):
        found[name] = torch.stack([errors[index][name] for index in range(shape.layers)])[None]
    found["query_head"] = found["query_head"].view(1, -1, shape.group)
    return found


def _errors(
    model: CausalLM, inputs: WriterInputs, context: DistributedContext
) -> list[dict[str, Tensor]]:
    """Of each block, the errors of its kinds of units; collective. A block's are worked out by one
    rank, another for each."""
    shape = shape_of(model.config)
    own: dict[int, dict[str, Tensor]] = {}
    with Progress("weigh removals", total=shape.layers, unit="block", transient=True) as bar:
        for index, block in enumerate(model.blocks):
            mine = index % context.world == context.rank
            for role in (Role.ATTENTION_OUTPUT, Role.FEED_FORWARD_OUTPUT):
                products = context.all_reduce_sum(inputs.products.pop((index, role)))
                weight = full_tensor(
                    block.get_submodule(model.names.with_role(role)).get_parameter("weight")
                )
                if mine:
                    found = _of_matrix(weight.double(), products.double(), role, shape)
                    own[index] = own.get(index, {}) | found
            bar.update(1)
    merged = {index: errors for part in context.gather(own) for index, errors in part.items()}
    return [merged[index] for index in range(shape.layers)]


def _of_matrix(weight: Tensor, products: Tensor, role: Role, shape: Shape) -> dict[str, Tensor]:
    """Errors of the kinds of units in the columns of `weight` [d, n], on the CPU."""
    products.diagonal().add_(DAMPING * products.diagonal().mean().clamp(min=1e-30))
    if role is Role.FEED_FORWARD_OUTPUT:
        return {"intermediate": channel_errors(weight, products).cpu()}
    columns = torch.arange(weight.shape[1], device=weight.device)
    heads = columns.view(shape.kv_heads, shape.group, -1)
    groups = removal_errors(weight, products, heads.flatten(1)).cpu()
    # The heads of one KV head compete with each other, and the others stay.
    single = torch.stack([removal_errors(weight, products, group) for group in heads])
    return {"kv_group": groups, "query_head": single.cpu().flatten()}


def removal_errors(weight: Tensor, products: Tensor, units: Tensor) -> Tensor:
    """The squared error of the outputs once each unit is gone, fp64 [u].

    Units go one after the other, the one first that adds least; all columns that are there make
    up for what went before.

    Args:
        weight: [d, n] fp64.
        products: [n, n] fp64, positive definite: X^T X of the inputs.
        units: [u, s] the columns of each unit.
    """
    weight = weight.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products))
    errors = torch.zeros(len(units), dtype=torch.float64, device=weight.device)
    left = torch.ones(len(units), dtype=torch.bool, device=weight.device)
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for _ in range(len(units)):
        parts = inverse[units[:, :, None], units[:, None, :]]
        # What is gone has zeros there.
        parts[~left] = torch.eye(units.shape[1], dtype=parts.dtype, device=parts.device)
        factors = torch.linalg.cholesky(parts)
        columns = weight.t()[units]
        solved = torch.cholesky_solve(columns, factors)
        costs = (columns * solved).sum((1, 2))
        chosen = costs.masked_fill(~left, torch.inf).argmin()
        total = total + costs[chosen].clamp(min=0)
        errors[chosen], left[chosen] = total, False
        gone = units[chosen]
        rows = inverse[gone]
        weight.addmm_(solved[chosen].t(), rows, alpha=-1)
        inverse.addmm_(rows.t(), torch.cholesky_solve(rows, factors[chosen]), alpha=-1)
        # Exactly nothing is left of them, whatever rounding says.
        inverse[gone], inverse[:, gone], weight[:, gone] = 0, 0, 0
    return errors


def channel_errors(weight: Tensor, products: Tensor) -> Tensor:
    """`removal_errors` of single columns: the same, with one matrix product for PANEL removals.

    A column's cost is the ratio of two diagonals, of W^T W and of the inverse of the products, both
    changed by rank-one terms at each removal. Until the panel is full, the terms are applied to the
    diagonals and to the columns that are looked at only.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products))
    squares = weight.t() @ weight
    count = len(products)
    errors = torch.zeros(count, dtype=torch.float64, device=weight.device)
    left = torch.ones(count, dtype=torch.bool, device=weight.device)
    inverse_diagonal, square_diagonal = inverse.diagonal().clone(), squares.diagonal().clone()
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, count, PANEL):
        width = min(PANEL, count - start)
        # inverse -= U U^T and squares -= P U^T + U P^T, column by column.
        u, p = (torch.zeros(count, width, dtype=torch.float64, device=weight.device) for _ in "up")
        for k in range(width):
            costs = square_diagonal / inverse_diagonal
            chosen = costs.masked_fill(~left, torch.inf).argmin()
            total = total + costs[chosen].clamp(min=0)
            errors[chosen], left[chosen] = total, False
            own_u, own_p = u[chosen, :k], p[chosen, :k]
            pivot = inverse_diagonal[chosen]
            u[:, k] = (inverse[:, chosen] - u[:, :k] @ own_u) / pivot.sqrt()
            column = squares[:, chosen] - p[:, :k] @ own_u - u[:, :k] @ own_p
            p[:, k] = column / pivot.sqrt() - u[:, k] * (square_diagonal[chosen] / (2 * pivot))
            inverse_diagonal -= u[:, k].square()
            square_diagonal -= 2 * p[:, k] * u[:, k]
        inverse.addmm_(u, u.t(), alpha=-1)
        squares.addmm_(p, u.t(), alpha=-1).addmm_(u, p.t(), alpha=-1)
    return errors
