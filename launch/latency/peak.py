"""The peak of memory of one generation, in a process that does nothing else.

`python -m launch.latency.peak FOLDER DTYPE THREADS INPUTS NEW BATCH` prints one number: on a GPU
the bytes that PyTorch held at most, on a CPU by how many bytes the process has grown; "out of
memory" where they were not there.
"""

import resource
import subprocess
import sys
from pathlib import Path

from launch.commands import child_environment

OUT_OF_MEMORY = "out of memory"


def peak_bytes(
    folder: Path, dtype: str, threads: int, inputs: int, new: int, batch: int
) -> int | None:
    """That number; None where memory ran out. Raises RuntimeError where the process failed."""
    words = [str(word) for word in (folder, dtype, threads, inputs, new, batch)]
    run = subprocess.run(
        [sys.executable, "-m", "launch.latency.peak", *words],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    last = run.stdout.strip().rpartition("\n")[2]
    if last == OUT_OF_MEMORY or run.returncode == -9:  # by the system
        return None
    if run.returncode or not last.isdigit():
        raise RuntimeError(f"measuring the memory of {folder} failed: {run.stderr[-2000:]}")
    return int(last)


def main(words: list[str]) -> None:
    """Measures and prints."""
    import torch

    from data.errors import is_out_of_memory
    from data.machine import end_with_parent
    from launch.latency.generation import Generator

    end_with_parent()
    folder, dtype, threads, inputs, new, batch = words
    torch.set_num_threads(int(threads))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = _held()
    try:
        model = Generator(Path(folder), device, getattr(torch, dtype))
        model.generate(model.prompts(int(batch), int(inputs)), int(new))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(OUT_OF_MEMORY)
        return
    on_gpu = device.type == "cuda"
    print(torch.cuda.max_memory_allocated(device) if on_gpu else max(0, _most_held() - before))


def _held() -> int:
    """Bytes that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not on Linux
        return _most_held()
    return pages * resource.getpagesize()


def _most_held() -> int:
    """Most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1:])
