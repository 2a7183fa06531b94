"""Perplexity of one document under a stated window and BOS rule."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from data.errors import InputError
from trainer.evaluate import perplexity
from trainer.models.decoder import CausalLM, LossOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentPerplexity:
    """Result, with everything needed to compute the same number elsewhere."""

    window: int
    """Positions the model sees at once, a BOS token included."""
    stride: int | None
    """Tokens between window starts; None: windows do not overlap."""
    bos: str
    """"no"; "yes": one BOS in front of the document; "every": one in front of each window."""
    tokens: int
    """Tokens of the text, without BOS."""
    targets: int
    """Tokens that were predicted and counted."""
    nll: float
    """Summed negative log-likelihood of the targets, in nats."""
    perplexity: float
    """exp(nll / targets)."""
    bits_per_byte: float
    """Mean bits per target token times tokens per UTF-8 byte of the text."""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass over ids[begin:end], of which no earlier window has seen ids[new:end]."""

    begin: int
    end: int
    new: int


def resolve_bos(rule: str, bos_id: int | None, adds_bos: bool) -> str:
    """The resolved rule: "auto" follows the tokenizer. Raises InputError without a BOS token."""
    if rule == "auto":
        return "yes" if adds_bos and bos_id is not None else "no"
    if rule != "no" and bos_id is None:
        raise InputError(f"--bos {rule}: this tokenizer has no BOS token; use --bos no")
    return rule


def windows(length: int, window: int, stride: int | None) -> Iterator[Window]:
    """Windows over `length` ids: side by side, or starting every `stride` ids and overlapping."""
    new = 0
    for begin in range(0, length, stride or window):
        end = min(begin + window, length)
        yield Window(begin, end, new)
        new = end
        if end == length:
            return


def document_perplexity(
    model: CausalLM,
    ids: list[int],
    *,
    text_bytes: int,
    bos: str,
    bos_id: int | None,
    window: int,
    stride: int | None,
    batch: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda targets: None,
) -> DocumentPerplexity:
    """Score `ids`, the whole document tokenized without special tokens.

    Args:
        text_bytes: UTF-8 length of the text, for bits per byte.
        bos: "no", "yes" or "every" (see resolve_bos).
        batch: windows per forward pass.
        progress: called with the number of targets each forward pass has scored.

    Raises:
        InputError: the window, stride or text leave nothing to predict.
    """
    rows = scored_rows(ids, bos, bos_id, window, stride)
    nll = torch.zeros((), dtype=torch.float64)
    targets = 0
    for group in _equal_length_groups(rows, batch):
        inputs = torch.tensor([row for row, _ in group], device=device)
        weights = torch.zeros(inputs.shape, dtype=torch.float32, device=device)
        for index, (_, first_target) in enumerate(group):
            # Position p predicts id p + 1; the last position has no target.
            weights[index, first_target - 1 : -1] = 1
        with torch.no_grad():
            output = model(inputs, targets=inputs.roll(-1, dims=1), weights=weights)
        assert isinstance(output, LossOutput)
        nll += _double_sum(output.token_loss)
        scored = int(weights.sum().item())
        targets += scored
        progress(scored)
    mean = nll.item() / targets
    return DocumentPerplexity(
        window=window,
        stride=stride,
        bos=bos,
        tokens=len(ids),
        targets=targets,
        nll=nll.item(),
        perplexity=perplexity(mean),
        bits_per_byte=mean / math.log(2) * len(ids) / text_bytes,
    )


def scored_rows(
    ids: list[int], bos: str, bos_id: int | None, window: int, stride: int | None
) -> list[tuple[list[int], int]]:
    """(ids of one forward pass, index of the first one that counts) for every window.

    An id counts in the first window that sees it, unless it has no context there. Raises
    InputError when the window, stride or text leave nothing to predict.
    """
    prefix = [bos_id] if bos == "every" and bos_id is not None else []
    sequence = [bos_id, *ids] if bos == "yes" and bos_id is not None else ids
    if window < 2:
        raise InputError(f"--window {window}: at least 2 positions are needed to predict a token")
    if stride is not None and not 1 <= stride < window:
        raise InputError(f"--stride {stride}: must lie between 1 and {window - 1} (--window - 1)")
    rows = []
    for cut in windows(len(sequence), window - len(prefix), stride):
        row = prefix + sequence[cut.begin : cut.end]
        first = max(1, len(prefix) + cut.new - cut.begin)
        if first < len(row):
            rows.append((row, first))
    if not rows:
        raise InputError(
            f"a text of {len(ids)} tokens leaves nothing to predict; give a longer one"
        )
    return rows


def _equal_length_groups(
    rows: list[tuple[list[int], int]], batch: int
) -> Iterator[list[tuple[list[int], int]]]:
    group: list[tuple[list[int], int]] = []
    for row in rows:
        if group and (len(group) == batch or len(group[0][0]) != len(row[0])):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _double_sum(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float64).sum()
