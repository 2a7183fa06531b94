"""A picture of what speed costs: the loss of models over their time per token."""

from pathlib import Path
from typing import Any

from data.errors import InputError
from launch.report.figures import COLOURS, WIDE, Group, Picture, label_axes


def draw(path: Path, models: list[dict[str, Any]]) -> None:
    """Writes a PNG of the models' losses over milliseconds per token, a picture for each batch
    size. Raises InputError where matplotlib is missing or the file cannot be written."""
    pictures = [
        _picture(models, place, cell["batch"])
        for place, cell in enumerate(models[0]["batches"])
        if any(one["batches"][place]["decode_ms_per_token"] is not None for one in models)
    ]
    group = Group("loss over time per token", "", pictures, wide=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(group.png())
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'shorn[demo]'") from None
    except OSError as error:
        raise InputError(f"--plot {path} cannot be written ({error})") from None


def _picture(models: list[dict[str, Any]], place: int, batch: int) -> Picture:
    points = [
        (one["batches"][place]["decode_ms_per_token"], one["loss"], one["model"]) for one in models
    ]

    def paint(axis: Any) -> None:
        for number, (time, loss, name) in enumerate(points):
            if time is not None:
                axis.plot(time, loss, "o", color=COLOURS[number % len(COLOURS)])
                axis.annotate(
                    name, (time, loss), xytext=(4, 4), textcoords="offset points", parse_math=False
                )
        # Room for the names.
        axis.margins(0.2)
        label_axes(axis, "ms per token", "held-out loss (nats)", whole="")

    return Picture(f"batch {batch}", f"Losses of {len(points)} models over time", paint, WIDE)
