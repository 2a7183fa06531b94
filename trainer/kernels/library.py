"""The compiled operators of csrc/, where they were built."""

import re
import struct
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
NAMES = ("gather_scale_compiled", "gather_scale_backward_compiled")
"""The operators that a library implements."""
BUILD = "pip install --no-build-isolation -e ."
"""What builds the libraries."""

# csrc/gather_scale_torch.h; readable also where a library does not load.
_BUILT_WITH = re.compile(rb"shorn built with torch ([^\s\0]+), CUDA ([^\s\0]+)\0")
_loaded: set[str] = set()
_problems: dict[str, str] = {}


def load() -> None:
    """Loads the libraries that were built for this PyTorch; without them the references run."""
    for device in ("cpu", "cuda"):
        path = _path(device)
        if not path.exists() or (device == "cuda" and torch.version.cuda is None):
            continue
        # One built for another machine or PyTorch, or from older sources, is as good as none.
        if _is_cut_short(path):
            _problems[device] = "is cut short"
            continue
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            # PyTorch's own words leave out why.
            reason = str(error.__cause__ or error).splitlines()
            _problems[device] = f"does not load ({reason[0] if reason else type(error).__name__})"
            continue
        if all(_implements(name, device) for name in NAMES):
            _loaded.add(device)
        else:
            _problems[device] = "holds other operators, those of other sources"


def _path(device: str) -> Path:
    return FOLDER / f"_shorn_{device}.so"


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its table of sections does. Loading it would end the process:
    its missing pages are mapped, and reading one is a bus error."""
    data = path.read_bytes()
    if not data.startswith(b"\x7fELF\x02\x01"):
        return False
    if len(data) < 64:
        return True
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    return bool(len(data) < start + size * count)


def _implements(name: str, device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"shorn::{name}", key)
    except RuntimeError:
        return False


def is_loaded(kind: str) -> bool:
    """Whether the library for a type of device ("cpu", "cuda") was built and could be loaded."""
    return kind in _loaded


def problem(kind: str) -> str | None:
    """Why the library for a type of device is there and not used; None: it is used, or absent."""
    if kind not in _problems:
        return None
    return f"{_path(kind)} {_problems[kind]}{origin(kind)}"


def origin(kind: str) -> str:
    """What the library for a type of device was built with and what runs now, to end a sentence;
    empty where the library does not tell."""
    try:
        found = _BUILT_WITH.search(_path(kind).read_bytes())
    except OSError:
        return ""
    if found is None:
        return ""
    version, cuda = (text.decode(errors="replace") for text in found.groups())
    return (
        f"; it was built with torch {version}, CUDA {cuda}, and this is torch {torch.__version__}, "
        f"CUDA {torch.version.cuda or 'none'}"
    )
