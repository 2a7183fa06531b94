"""Reference losses of a model size that nobody trained, from the losses of sizes that were.

Per domain the held-out losses of several sizes of one model family are fitted with

    L(N) = a / N^b + c,    a > 0, b > 0, c >= 0

over the total number of parameters N, and evaluated at the size in question (Sheared LLaMA, arXiv
2310.06694, appendix B; the data term of the scaling law is part of c, because all sizes saw the
same data). The bound on c is not the paper's: three sizes determine three unknowns whatever the
data, and an irreducible loss below 0 means that the curve is not identified.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from unicodedata import normalize

import numpy as np

from data.errors import InputError, naming
from data.pipes import read_again
from data.records import is_finite, parse_json

FLAG = "--reference-fit"
LEAST_SIZES = 3
LARGEST_ERROR = 0.05
"""Nats per token by which a fit may miss a measured loss before a warning."""
LARGEST_EXTRAPOLATION = 10.0
"""Factor beyond the measured sizes up to which a fit is evaluated without a warning."""
LARGEST_SIZE_DIGITS = 18
EXPONENTS = (1e-3, 2.0)
"""Range searched for b; published language models lie between 0.03 and 0.5."""


@dataclass(frozen=True, slots=True)
class ScalingFit:
    """L(N) = a / N^b + c in nats per token, over N parameters."""

    a: float
    b: float
    c: float
    error: float
    """Largest distance in nats of a fitted from its measured loss."""
    left_out_error: float | None
    """The same when each size is predicted from the others; None for fewer than four sizes."""

    def loss(self, parameters: float) -> float:
        """The fitted loss of a model with so many parameters."""
        return self.a * parameters**-self.b + self.c

    def describe(self) -> str:
        """The curve and how well it fits, for people."""
        curve = f"{self.a:.4g} / N^{self.b:.4f} + {self.c:.4f}"
        if self.left_out_error is None:
            return f"{curve}, error {self.error:.4f}"
        return f"{curve}, error {self.error:.4f}, leave-one-out {self.left_out_error:.4f}"


@dataclass(frozen=True, slots=True)
class FittedReference:
    """Reference losses at one size, from fits of every domain."""

    losses: dict[str, float]
    """Nats per token of each domain."""
    notes: list[str]
    """The values and their curves."""
    warnings: list[str]
    """What makes them doubtful."""


def fit_scaling(losses: Mapping[int, float], domain: str) -> ScalingFit:
    """Least-squares fit of one domain's `losses` (nats per token) by number of parameters.

    Raises InputError for fewer than three sizes, losses that are not positive numbers, or losses
    that do not fall from each size to the next.
    """
    sizes = sorted(losses)
    if len(sizes) < LEAST_SIZES:
        raise InputError(
            f"{FLAG}: domain {domain!r} has losses of {len(sizes)} model sizes; the curve has "
            f"three unknowns, so give at least {LEAST_SIZES} sizes, or the losses themselves with "
            "--reference-losses"
        )
    for size in sizes:
        if not (isfinite(losses[size]) and losses[size] > 0):
            raise InputError(
                f"{FLAG}: the loss of domain {domain!r} at {size:,} parameters is {losses[size]}; "
                "losses are nats per token, above 0"
            )
    for small, large in pairwise(sizes):
        if losses[large] >= losses[small]:
            raise InputError(
                f"{FLAG}: the loss of domain {domain!r} does not fall from {small:,} parameters "
                f"({losses[small]}) to {large:,} ({losses[large]}): models that share data and "
                "tokenizer improve with size; leave out what was measured differently, or use "
                "--reference-losses"
            )
    n, loss = np.array(sizes, np.float64), np.array([losses[size] for size in sizes])
    a, b, c = _least_squares(n, loss)
    error = float(np.abs(a * n**-b + c - loss).max())
    left_out = _left_out_error(n, loss) if len(sizes) > LEAST_SIZES else None
    return ScalingFit(a, b, c, error, left_out)


def fitted_reference(path: Path, domains: set[str], parameters: int) -> FittedReference:
    """Reference losses of `domains` at `parameters`, fitted to the sizes in the JSON file `path`.

    The file holds {"sizes": {"<parameters>": {"<domain>": <nats per token>, ...}, ...}}. Raises
    InputError for a file of another form, for other domains than these, or for losses that cannot
    be fitted.
    """
    sizes = read_sizes(path)
    for size, losses in sizes.items():
        if losses.keys() != domains:
            raise InputError(
                f"{FLAG} {path}: size {size:,} has losses of {sorted(losses)}, the data has the "
                f"domains {sorted(domains)}; give each exactly once for every size"
            )
    fits = {
        domain: fit_scaling({size: losses[domain] for size, losses in sizes.items()}, domain)
        for domain in sorted(domains)
    }
    # Rounded, so that a run resumes on a machine whose arithmetic differs in the last digits.
    reference = {domain: round(fit.loss(parameters), 6) for domain, fit in fits.items()}
    notes = [
        f"reference loss of {domain} fitted at {parameters:,} parameters: {reference[domain]:.4f} "
        f"nats per token ({fit.describe()})"
        for domain, fit in fits.items()
    ]
    warnings = [text for domain, fit in fits.items() for text in _warnings(domain, fit)]
    warnings += _range_warning(sorted(sizes), parameters)
    return FittedReference(reference, notes, warnings)


def read_sizes(path: Path) -> dict[int, dict[str, float]]:
    """{parameters: {domain: nats per token}} of a fit file. Raises InputError for another form."""
    place = f"{FLAG} {path}"
    fix = (
        f"{FLAG} takes a JSON file of losses by number of parameters such as "
        '{"sizes": {"6738415616": {"c4": 1.92, ...}, ...}}'
    )
    with naming(FLAG):
        text = read_again(path, fix)
    content = parse_json(text, place, fix, keys={"sizes": dict})
    sizes: dict[int, dict[str, float]] = {}
    for name, losses in content["sizes"].items():
        size = int(name) if name.isdecimal() and len(name) <= LARGEST_SIZE_DIGITS else 0
        if size < 1 or size in sizes:
            raise InputError(
                f"{place}: size {name!r} is not a whole number of parameters, or is there twice; "
                f"{fix}"
            )
        if not isinstance(losses, dict) or not all(map(is_finite, losses.values())):
            raise InputError(f"{place}: size {name}: losses must be finite numbers; {fix}")
        sizes[size] = {normalize("NFC", domain): loss for domain, loss in losses.items()}
        if len(sizes[size]) < len(losses):
            raise InputError(f"{place}: size {name}: two of {sorted(losses)} are one domain; {fix}")
    return sizes


def _least_squares(n: np.ndarray, loss: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) with the smallest sum of squared errors: a search over b, which decides a and c."""
    # Sizes relative to their geometric mean keep N^-b near 1.
    middle = float(np.exp(np.log(n).mean()))
    relative = n / middle
    grid = np.geomspace(*EXPONENTS, 400)
    best = int(np.argmin([_solve(relative, loss, float(b))[2] for b in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-10:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if _solve(relative, loss, left)[2] <= _solve(relative, loss, right)[2]:
            high = right
        else:
            low = left
    b = (low + high) / 2
    a, c, _ = _solve(relative, loss, b)
    return a * middle**b, b, c


def _solve(relative: np.ndarray, loss: np.ndarray, b: float) -> tuple[float, float, float]:
    """The best a > 0 and c >= 0 at this b, and their sum of squared errors.

    Falling losses correlate with N^-b, so a is positive without being asked to.
    """
    x = relative**-b
    centred = x - x.mean()
    a = float(centred @ loss / (centred @ centred))
    c = float(loss.mean() - a * x.mean())
    if c < 0:
        a, c = float(x @ loss / (x @ x)), 0.0
    residual = a * x + c - loss
    return a, c, float(residual @ residual)


def _left_out_error(n: np.ndarray, loss: np.ndarray) -> float:
    errors = []
    for index in range(len(n)):
        a, b, c = _least_squares(np.delete(n, index), np.delete(loss, index))
        errors.append(abs(float(a * n[index] ** -b + c - loss[index])))
    return max(errors)


def _warnings(domain: str, fit: ScalingFit) -> list[str]:
    warnings = []
    if fit.c == 0:
        warnings.append(
            f"{domain}: the best curve would have an irreducible loss below 0, so c is "
            "held at 0; more sizes, or smaller ones, would determine it"
        )
    if fit.b > 0.999 * EXPONENTS[1]:
        warnings.append(
            f"{domain}: the losses fall faster than with N^-{EXPONENTS[1]:g}, the largest "
            "exponent tried; check that all sizes were measured alike"
        )
    if fit.error > LARGEST_ERROR:
        warnings.append(
            f"{domain}: the fit misses a measured loss by {fit.error:.3f} nats (more than "
            f"{LARGEST_ERROR}); no curve of this form passes near all sizes"
        )
    if fit.left_out_error is not None and fit.left_out_error > LARGEST_ERROR:
        warnings.append(
            f"{domain}: predicting one size from the others misses by "
            f"{fit.left_out_error:.3f} nats (more than {LARGEST_ERROR}); do not trust the fit far "
            "from the measured sizes"
        )
    return warnings


def _range_warning(sizes: list[int], parameters: int) -> list[str]:
    factor = max(sizes[0] / parameters, parameters / sizes[-1])
    if factor <= LARGEST_EXTRAPOLATION:
        return []
    return [
        f"{parameters:,} parameters lie {factor:.0f}x outside the measured sizes "
        f"({sizes[0]:,} to {sizes[-1]:,}; more than {LARGEST_EXTRAPOLATION:.0f}x): measure a model "
        "nearer to it, or leave out --reference-fit"
    ]
