"""Learning rate as a pure function of the step, so that a resumed run cannot differ."""

import math


def learning_rate(
    step: int, *, steps: int, peak: float, warmup_ratio: float, min_ratio: float
) -> float:
    """Learning rate of the zero-based optimizer step `step` of `steps`.

    Rises linearly over the first ceil(warmup_ratio * steps) steps, whose last one has the peak,
    then follows half a cosine down to `min_ratio * peak` at the last step.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    span = max(1, steps - 1 - max(warmup - 1, 0))
    progress = min(1.0, (step - max(warmup - 1, 0)) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1.0 - min_ratio) * cosine)
