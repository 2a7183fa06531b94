"""Finds the folder of a model that the user named: a folder, a run, a GGUF file or a hub id."""

import hashlib
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from data.errors import InputError

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
_DOWNLOAD_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(source: str | Path, converted: Path | None = None) -> Path:
    """The Hugging Face folder (config.json and safetensors) of a model.

    Args:
        source: a folder with config.json; a run's output folder with model/config.json; a .gguf
            file or a folder with exactly one; or a hub id, taken from the local cache if it is
            there and downloaded otherwise.
        converted: folder for the conversion of a GGUF source; by default one in the user's cache,
            so that a file is converted once.

    Raises:
        InputError: nothing is found; the message says what to fetch and how.
    """
    text = str(source)
    path = Path(source).expanduser()
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            _require_safetensors(folder)
            return folder
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path, converted or _gguf_cache(path))
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return convert_gguf(files[0], converted or _gguf_cache(files[0]))
        found = f"{len(files)} .gguf files; name one of them" if files else "no config.json"
        raise InputError(
            f"{path} is not a model folder: it holds {found}. Expected config.json with "
            "*.safetensors, model/config.json, or one .gguf file"
        )
    if _HUB_ID.fullmatch(text):
        return _from_hub(text)
    raise InputError(
        f"model {text!r} does not exist. Give a folder with config.json and *.safetensors, a "
        ".gguf file, a finished run's folder, or a hub id such as meta-llama/Llama-2-7b-hf"
    )


def convert_gguf(path: Path, output: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder in fp32 with its tokenizer; returns `output`.

    Does nothing where `output` already holds a model. Half a minute for 135M parameters.

    Raises:
        InputError: the packages that read GGUF are missing, or transformers cannot read the file.
    """
    if (output / "config.json").is_file():
        return output
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(f"reading {path} needs {' and '.join(missing)}: pip install 'shorn[demo]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            # Without this the model counts as quantized and refuses to be saved.
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(output)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"cannot convert {path} to {output}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _gguf_cache(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache / "shorn" / f"{path.stem}-{digest}"


def _require_safetensors(folder: Path) -> None:
    if any(next(folder.glob(pattern), None) for pattern in WEIGHT_PATTERNS):
        return
    other = next((p.name for p in sorted(folder.glob("*.bin"))), None)
    reason = f"only {other}" if other else "no weights"
    raise InputError(
        f"{folder} has config.json but no *.safetensors ({reason}). Save the model once with "
        "transformers' save_pretrained, or fetch a safetensors version"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = list(_DOWNLOAD_PATTERNS)
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    except OSError:
        pass
    fetch = (
        f"`hf download {name} --local-dir models/{name.split('/')[1]}` on a machine that can, "
        f"then --source (or --model) models/{name.split('/')[1]}"
    )
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, run "
            f"`hf auth login`, and try again; or {fetch}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"model {name!r} is neither a folder here nor on the Hugging Face hub (or it is "
            "private: run `hf auth login`)"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model {name!r} is not a folder here, not in the local Hugging Face cache, and cannot "
            f"be downloaded ({reason}). Fetch it with {fetch}"
        ) from error
    _require_safetensors(folder)
    return folder
