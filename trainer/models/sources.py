"""Finds the folder of a model that the user named: a folder, a run, a GGUF file or a hub id."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from data.errors import InputError
from data.files import follow_umask, sync_files

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOCAL_PREFIXES = (".", "~", "runs/", "models/")


def resolve_model(source: str | Path, *, weights: bool = True, option: str = "--model") -> Path:
    """The Hugging Face folder (config.json and safetensors) of a model.

    Args:
        source: a folder with config.json; a run's output folder with model/config.json; a .gguf
            file or a folder with exactly one (converted once, in the user's cache); or a hub id,
            taken from the local cache if it is there and downloaded otherwise.
        weights: False fetches no weights of a hub id, only its config and tokenizer.
        option: the option that gave `source`, for messages.

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
        return convert_gguf(path, _gguf_cache(path))
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return convert_gguf(files[0], _gguf_cache(files[0]))
        found = f"{len(files)} .gguf files; name one of them" if files else "no config.json"
        raise InputError(
            f"{path} is not a model folder: it holds {found}. Expected config.json with "
            "*.safetensors, model/config.json, or one .gguf file"
        )
    if is_hub_id(text):
        return _from_hub(text, weights, option)
    raise InputError(
        f"{option} {text}: no such model. Give a folder with config.json and *.safetensors, a "
        ".gguf file, a finished run's folder, or a hub id such as meta-llama/Llama-2-7b-hf"
    )


def is_hub_id(text: str) -> bool:
    """Whether `text` can name a model on the hub; what looks like a path here never does."""
    looks_local = text.startswith(_LOCAL_PREFIXES) or Path(text).parent.exists()
    return _HUB_ID.fullmatch(text) is not None and not looks_local


def fetch_advice(name: str, option: str) -> str:
    """How to get the model `name` of the hub into a local folder, and use it."""
    folder = local_folder(name)
    return (
        f"accept the licence at https://huggingface.co/{name} (if it asks for that), log in with "
        f"`hf auth login`, and fetch it, here or on a machine that can:\n"
        f"    hf download {name} --include '*.json' --include '*.safetensors' "
        f"--include 'tokenizer.model' --local-dir {folder}\n"
        f"  then give {option} {folder}"
    )


def local_folder(name: str) -> str:
    """Where fetch_advice puts the model `name` of the hub."""
    return f"models/{name.split('/')[-1]}"


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
        raise InputError(
            f"reading {path} needs {' and '.join(missing)}: pip install gguf accelerate"
        )
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
        follow_umask(temporary)
        _publish(temporary, output)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"cannot convert {path} to {output}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _publish(temporary: Path, output: Path) -> None:
    sync_files(temporary)
    try:
        temporary.rename(output)
    except OSError:
        # Another process may have converted the same file in the meantime.
        if not (output / "config.json").is_file():
            raise


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


def _from_hub(name: str, weights: bool, option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = [*_SMALL_FILES, *(("*.safetensors",) if weights else ())]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if _is_complete(folder, weights):
            return folder
    except OSError:
        pass
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        if isinstance(error, GatedRepoError):
            reason = "it is gated, and this login has no access"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the Hugging Face hub has no such model, or it is private"
        else:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            reason = f"it cannot be downloaded ({text})"
        raise InputError(
            f"{option} {name}: not a folder here, not in the local Hugging Face cache, and "
            f"{reason}. To get it, {fetch_advice(name, option)}"
        ) from error
    if weights:
        _require_safetensors(folder)
    return folder


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a cached folder has its config and all weights, or else config and tokenizer."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / INDEX_FILE
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        files = {path.name for path in folder.glob("*.safetensors")}
    if files and all((folder / file).is_file() for file in files):
        return True
    return not weights and any((folder / file).is_file() for file in TOKENIZER_FILES)


def weights_fingerprint(folder: Path) -> str:
    """Hash of a model folder's safetensors files: sizes, headers and a few samples of each, so that
    it is quick for any model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for position in range(0, size, max(1, size // 64)):
                file.seek(position)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
