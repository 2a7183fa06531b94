"""The end of a run that trained a model: its report, and what to say of it."""

from pathlib import Path
from typing import Any

from data.log import logger
from trainer.loop import Trainer
from trainer.models.hf import check_weights, load_config
from trainer.run import training_report
from trainer.saving import publish
from trainer.verdict import REPORTS, carry, show_trained


def conclude_training(
    trainer: Trainer,
    report_file: Path,
    start: Path | None,
    data: str,
    dtype: str,
    copy: str | None,
    more: dict[str, Any] | None = None,
) -> None:
    """Writes the report of a run whose model is in the folder `model` beside it, and says what the
    run has come to; collective.

    Args:
        trainer: after its last step.
        report_file: where the report goes.
        start: folder of the model that training started from; None for random weights.
        data: the token folder.
        dtype: the type in which the model was written, by name.
        copy: where a copy of the report goes; None: nowhere.
        more: what the report holds besides.
    """
    output = report_file.parent
    # Before the checkpoints go: what is there can be read again.
    trainer.context.raise_on_any_rank(
        lambda: check_weights(output / "model", load_config(output / "model"))
    )
    if dtype != "float32":
        logger.info(f"note: losses are of the weights in float32; {output / 'model'} has {dtype}")
    report = training_report(trainer) | carry(trainer, start) | (more or {})
    publish(trainer.context, report, copy, report_file)
    logger.info(
        f"final loss {trainer.loss:.4f} after {trainer.tokens:,} tokens "
        f"({report['tokens_per_second']:,.0f} tokens/s in steps, "
        f"{report['wall_tokens_per_second']:,.0f} with evaluation and checkpoints): "
        f"{output / 'model'}",
    )
    if trainer.context.is_main:
        show_trained(report, output, start, data, REPORTS[report_file.name])
