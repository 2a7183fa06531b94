"""What a GPU measurement was made on: the card and its power cap, versions, commit."""

import importlib.metadata
import platform
import subprocess
import time
from typing import Any

import torch

from launch.commands import ROOT
from trainer.kernels import library, linear_cross_entropy, registry

UNKNOWN = "unknown"
PACKAGES = ("torch", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4")


def facts(device: torch.device) -> dict[str, str]:
    """Words and numbers for a record; "unknown" or "not installed" where there is none."""
    return {
        **_card(device),
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "csrc": _csrc(device),
        "head's gradient": "summed by products" if _adds(device) else "summed apart",
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _csrc(device: torch.device) -> str:
    """Whether the operators of csrc/ were compiled for this type of device, and could be loaded."""
    registry.operators()
    built = "built" if library.is_loaded(device.type) else "not built"
    return library.problem(device.type) or built


def _adds(device: torch.device) -> bool:
    """Whether bf16 products of the loss add to fp32 sums themselves."""
    return linear_cross_entropy.adds_to(torch.float32, torch.bfloat16, device)


def _card(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        name = platform.processor() or platform.machine()
        return {"gpu": f"none ({name})", "power cap": UNKNOWN, "driver": UNKNOWN}
    try:
        properties: Any = torch.cuda.get_device_properties(device)
    # A kernel that took the device down must not take the report along.
    except RuntimeError as error:
        reason = f"{UNKNOWN} ({str(error).splitlines()[0]})"
        return {"gpu": reason, "power cap": UNKNOWN, "driver": UNKNOWN}
    cap, driver = _ask_driver(getattr(properties, "uuid", None))
    return {
        "gpu": properties.name,
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "capability": f"{properties.major}.{properties.minor}",
        "power cap": cap,
        "driver": driver,
    }


def _ask_driver(uuid: object) -> tuple[str, str]:
    """Power cap and driver version of the card; nvidia-smi may be missing or deny them."""
    query = ["nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader"]
    if uuid is not None:
        query.append(f"--id=GPU-{str(uuid).removeprefix('GPU-')}")
    cap, driver = [*_output(query).split("\n")[0].split(", "), "", ""][:2]
    return cap or UNKNOWN, driver or UNKNOWN


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Abbreviated, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}{' with changes' if changed else ''}" if commit else UNKNOWN


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if result.returncode else result.stdout.strip()
