"""What a training run needs of the disk: refused before step 1, told apart from other failures."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

from data.errors import failure, is_full
from trainer.config import ALL_CHECKPOINTS

CHECKPOINT_BYTES = 12
"""Per parameter at most: the weight and both Adam moments in fp32; Muon keeps one of a matrix."""
MOMENT_BYTES = 8
"""Per parameter at most, of them the moments."""
PROBE_BYTES = 1 << 20
"""What must fit on a disk that is not called full."""


def size_text(size: float) -> str:
    """Bytes in the unit that fits: "1.23 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def room_problem(
    output: Path,
    *,
    checkpoint: int,
    saves: int,
    existing: int,
    keep: int,
    model: int,
) -> str | None:
    """What to say when the rest of a run does not fit the disk; None when it does.

    A checkpoint is written before the oldest one goes, and the model once the last one is there.

    Args:
        output: the run's folder, which need not exist. OUTPUT/checkpoints may lie on another disk.
        checkpoint: bytes of one checkpoint.
        saves: checkpoints that the run will still save.
        existing: checkpoints that are there.
        keep: checkpoints that stay while the run is unfinished.
        model: bytes of the final model.
    """
    most = max(0, min(existing + saves, keep + 1) - existing)
    last = max(0, min(existing + saves, keep) - existing)
    folders = (output / "checkpoints", output)
    if _disk_of(folders[0]) == _disk_of(folders[1]):
        needs = [(output, max(most * checkpoint, last * checkpoint + model))]
    else:
        needs = list(zip(folders, (most * checkpoint, model), strict=True))
    for folder, needed in needs:
        free = free_bytes(folder)
        if free < needed:
            fixes = ["free some space", "name another --output"]
            if keep > 1 and most > 1:
                fixes.append(
                    "leave --keep-all-checkpoints out"
                    if keep >= ALL_CHECKPOINTS
                    else f"lower --keep-checkpoints (now {keep})"
                )
            if saves > 1:
                fixes.append("use --save-interval 0, which saves once at the end")
            return (
                f"{folder}: no room for what this run will write: {size_text(needed)} are needed "
                f"({_parts(most, checkpoint, model)}), {size_text(free)} are free; "
                f"{', '.join(fixes[:-1])} or {fixes[-1]}"
            )
    return None


def free_bytes(folder: Path) -> int:
    """Bytes that can be written where `folder` is, or will be."""
    usage = shutil.disk_usage(_nearest(folder))
    # Some network file systems do not tell: then nothing is refused.
    return usage.free if usage.total else sys.maxsize


def is_out_of_space(error: BaseException, folder: Path) -> bool:
    """Whether a write into `folder` failed for lack of room.

    Libraries hide the system's error behind their own, so the disk is asked as well.
    """
    if isinstance(error, OSError) and is_full(error):
        return True
    if "No space left" in str(error) or "Disk quota exceeded" in str(error):
        return True
    refused = _refusal(folder)
    return refused is not None and is_full(refused)


def is_too_large(error: BaseException, folder: Path) -> bool:
    """Whether a write into `folder` failed of a limit on the size of files (`ulimit -f`)."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return True
    refused = _refusal(folder)
    return refused is not None and refused.errno == errno.EFBIG


def why_unwritten(error: OSError, folder: Path) -> str:
    """Why a write into `folder` failed, and what helps."""
    for number, applies in ((errno.ENOSPC, is_out_of_space), (errno.EFBIG, is_too_large)):
        if applies(error, folder):
            return failure(OSError(number, ""))
    return failure(error)


def _refusal(folder: Path) -> OSError | None:
    """What the system says to a file in `folder` that is as large as one of ours may be."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error
    return None


def _parts(checkpoints: int, checkpoint: int, model: int) -> str:
    each = f"{checkpoints} checkpoint{'s' * (checkpoints != 1)} of {size_text(checkpoint)}"
    return f"{each}, the model {size_text(model)}"


def _disk_of(folder: Path) -> int:
    return _nearest(folder).stat().st_dev


def _nearest(folder: Path) -> Path:
    """`folder`, or the first folder above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())
