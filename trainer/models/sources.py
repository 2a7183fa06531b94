"""Finds the folder of a model that the user named: a folder, a run, a GGUF file or a hub id."""

import hashlib
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.errors import InputError, MissingInput, failure, naming
from data.files import follow_umask, sync_files
from data.gguf import gguf_files, is_gguf
from data.hub import (
    cached_snapshot,
    id_of_page,
    is_hub_id,
    is_offline,
    may_be_hub_id,
    owner_of,
    split_revision,
)
from data.paths import home_expanded, require_utf8
from data.places import odd_name, what_is
from data.tokenizers import holds_tokenizer
from trainer.finished import without_model
from trainer.models.export import widen
from trainer.models.gguf_header import check_gguf
from trainer.models.weights import adapter_advice, weight_files

_SMALL_FILES = (
    "*.json",
    "*.jinja",
    "tokenizer.model*",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# The same model in the layout of its makers' own programs.
_OTHER_LAYOUTS = ("consolidated*", "original/*")
_OTHER_CACHE = "set XDG_CACHE_HOME to a folder that can be written and has room"


def resolve_model(source: str | Path, *, weights: bool = True, option: str = "--model") -> Path:
    """The Hugging Face folder (config.json and safetensors) of a model.

    Args:
        source: a folder with config.json; a run's output folder with model/config.json; a .gguf
            file or a folder with exactly one (converted once, in the user's cache); or a hub id,
            with @ and a branch, tag or commit for another than its newest state, taken from the
            local cache if it is there and downloaded otherwise.
        weights: False fetches no weights of a hub id, only its config and tokenizer.
        option: the option that gave `source`, for messages.

    Raises:
        InputError: nothing is found; the message says what to fetch and how.
    """
    text = str(source)
    path = Path(home_expanded(source, option))
    require_utf8(path)
    if path.is_file():
        if not is_gguf(path):
            raise InputError(f"{option} {text}: is one file, and no GGUF{_whose(path)}")
        return convert_gguf(path, _gguf_cache(path))
    if path.is_dir():
        with naming(option):
            return _from_folder(path, option)
    if is_hub_id(text):
        return _from_hub(text, weights, option)
    if path.parent.is_dir():
        _refuse_parts_of_runs(path, option)
    if may_be_hub_id(text) and owner_of(text).is_dir():
        raise InputError(
            f"{option} {text}: no such model here, and the folder {owner_of(text)}/ in this "
            "working folder keeps it from being taken for a hub id. Correct the path; or, if it is "
            f"one, start from another working folder, or {_download(text, option)}"
        )
    page = id_of_page(text)
    if page is not None:
        raise InputError(
            f"{option} {text}: is the address of a page; name the model by its hub id: "
            f"{option} {page}"
        )
    found, advice = what_is(path), odd_name(text, patterns=False)
    raise MissingInput(
        f"{option} {text}: no such model{found and f', it is {found}'}{advice and f'; {advice}'}. "
        "Give a folder with config.json and *.safetensors, a "
        ".gguf file, a finished run's folder, or a hub id such as meta-llama/Llama-2-7b-hf "
        "(with @ and a branch, tag or commit: meta-llama/Llama-2-7b-hf@main)"
    )


def _from_folder(path: Path, option: str) -> Path:
    files = gguf_files(path)
    for folder in (path, path / "model"):
        # A folder of GGUF files may hold the config of the model that they were made from.
        ours = not files or folder != path or any(path.glob("*.safetensors*"))
        if (folder / "config.json").is_file() and ours:
            weight_files(folder)
            return folder
    if len(files) == 1:
        return convert_gguf(files[0], _gguf_cache(files[0]))
    adapter = None if files else adapter_advice(path)
    if adapter is not None:
        raise InputError(adapter)
    if not files:
        _refuse_parts_of_runs(path, option)
    inner = _inner_models(path)
    known = what_is(path)
    found = f"no config.json{inner or (known and f'; it is {known}')}"
    if files:
        found = f"{len(files)} GGUF files; name one of them"
    raise InputError(
        f"{path} is not a model folder: it holds {found}. Expected config.json with "
        "*.safetensors, model/config.json, or one .gguf file"
    )


def _whose(file: Path) -> str:
    """What a file that is no model is instead, and the model's folder where it belongs to one."""
    run = (file.parent / "run.json").is_file()
    folder = file.parent / "model" if run else file.parent
    if (folder / "config.json").is_file():
        return f": name the model's folder, {folder}"
    return (
        f" (it is {what_is(file)}): name a folder with config.json and *.safetensors, a .gguf "
        "file, a run's folder or a hub id"
    )


def _inner_models(path: Path) -> str:
    """Where in a folder without a model there is one, in words; empty where there is none."""
    cached = cached_snapshot(path)
    if cached is not None:
        return f"; as a folder of the hub's cache it does in {cached}: name that one"
    names = [file.parent.name for file in path.glob("*/config.json")]
    # By number, as checkpoints are called: 1000 comes after 500.
    names.sort(key=lambda name: [int(part) for part in re.findall(r"[0-9]+", name)] or [-1])
    if len(names) < 2:
        return f"; its folder {names[0]} does" if names else ""
    return f"; its folders {', '.join(names[:-1][-3:])} and {names[-1]} do: name one of them"


def _refuse_parts_of_runs(path: Path, option: str) -> None:
    """Raises InputError for the folder of a run without a model, and for its checkpoints, which are
    a state of training."""
    place = path.resolve()
    for run in (place, place.parent, place.parent.parent):
        if not (run / "run.json").is_file():
            continue
        if (run / "model" / "config.json").is_file():
            raise InputError(f"{option} {path}: is no model; the run's model is {run / 'model'}")
        part = "the folder" if run == place else "a part"
        raise MissingInput(f"{option} {path}: is {part} of {without_model(run)}")


def fetch_advice(name: str, option: str) -> str:
    """How to get the model `name` of the hub into a local folder, and use it."""
    where = (
        "on a machine that may use the network" if is_offline() else "here or on a machine that can"
    )
    page = split_revision(name)[0]
    return (
        f"accept the licence at https://huggingface.co/{page} (if it asks for that), log in with "
        f"`hf auth login`, and fetch it, {where}:\n    {_download(name, option)}"
    )


def _download(name: str, option: str) -> str:
    folder = local_folder(name)
    bare, revision = split_revision(name)
    which = f"{bare} --revision {revision}" if revision else bare
    return (
        f"hf download {which} --include '*.json' --include '*.safetensors' --include '*.jinja' "
        f"--include 'LICENSE*' --include '*.txt' --include 'tokenizer.model' --local-dir {folder}\n"
        f"  then give {option} {folder}"
    )


def local_folder(name: str) -> str:
    """Where fetch_advice puts the model `name` of the hub."""
    bare, revision = split_revision(name)
    which = f"-{revision.replace('/', '-')}" if revision else ""
    return f"models/{bare.split('/')[-1]}{which}"


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
    check_gguf(path)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise InputError(_cannot_convert(path, output, failure(error, _OTHER_CACHE))) from None
    try:
        _convert(path, temporary)
        follow_umask(temporary)
        _publish(temporary, output)
    except OSError as error:
        fix = _OTHER_CACHE if error.errno else None
        raise InputError(_cannot_convert(path, output, failure(error, fix))) from error
    except SafetensorError as error:
        raise InputError(_cannot_convert(path, output, f"{error}; {_OTHER_CACHE}")) from error
    except Exception as error:  # transformers raises many types for a file it cannot read
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise InputError(
            _cannot_convert(path, output, f"{reason}; fetch the file again, or another conversion")
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _convert(path: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        # Without this the model counts as quantized and refuses to be saved.
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, found = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # transformers draws at random what is not there, and drops what it has no place for.
        if found[problem]:
            names = ", ".join(map(str, sorted(found[problem])[:3]))
            raise ValueError(f"{problem.replace('_keys', '')} tensors: {names}")
    model.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(output)
    widen(output)


def _cannot_convert(path: Path, output: Path, reason: str) -> str:
    return f"cannot convert {path} to {output}: {reason}"


def _publish(temporary: Path, output: Path) -> None:
    sync_files(temporary)
    try:
        temporary.rename(output)
    except OSError:
        # Another process may have converted the same file in the meantime.
        if not (output / "config.json").is_file():
            raise


def _gguf_cache(path: Path) -> Path:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise InputError(
            f"{path} is converted once into a folder in your home, and there is none (HOME is not "
            f"set): {_OTHER_CACHE}"
        ) from None
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return cache / "shorn" / f"{path.stem}-{digest}"


def _from_hub(name: str, weights: bool, option: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    bare, revision = split_revision(name)
    wanted: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": [*_SMALL_FILES, *(("*.safetensors",) if weights else ())],
        "ignore_patterns": list(_OTHER_LAYOUTS),
    }
    try:
        folder = Path(snapshot_download(bare, local_files_only=True, **wanted))
        if _is_complete(folder, weights):
            return folder
    except OSError:
        pass
    try:
        folder = Path(snapshot_download(bare, **wanted))
    except Exception as error:
        if isinstance(error, GatedRepoError):
            reason = "it is gated, and this login has no access"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the Hugging Face hub has no such model, or it is private"
        elif isinstance(error, RevisionNotFoundError):
            reason = f"the Hugging Face hub has no branch, tag or commit {revision!r} of it"
        elif is_offline():
            reason = "HF_HUB_OFFLINE forbids to ask the hub (unset it to download)"
        else:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            reason = f"it cannot be downloaded ({text})"
        raise MissingInput(
            f"{option} {name}: not a folder here, not in the local Hugging Face cache, and "
            f"{reason}. To get it, {fetch_advice(name, option)}"
        ) from error
    if weights:
        weight_files(folder)
    return folder


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a cached folder has its config and all weights, or else config and tokenizer."""
    if not (folder / "config.json").is_file():
        return False
    try:
        weight_files(folder)
    except InputError:
        return not weights and holds_tokenizer(folder)
    return True


def weights_fingerprint(folder: Path) -> str:
    """Hash of a model folder's weights: sizes, headers and a few samples of each file, so that it
    is quick for any model.

    Raises InputError when `folder` holds no weights, or they cannot be read.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        try:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for position in range(0, size, max(1, size // 64)):
                    file.seek(position)
                    digest.update(file.read(4096))
        except OSError as error:
            raise InputError(f"{path}: {failure(error)}") from None
    return digest.hexdigest()[:16]
