"""What a model folder holds beside its weights, written so that other programs load it too.

transformers 5 names some values anew: a folder with the new names alone is read wrongly, without a
word, by transformers 4 and by what is built on it. Written are both.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.files import write_text
from data.log import logger
from data.manifest import ChatRecord
from data.records import read_json, require_no_mark
from trainer.models.config import ModelConfig
from trainer.models.families import FAMILIES
from trainer.models.layer_sizes import SUFFIX
from trainer.models.limits import shortened
from trainer.models.uneven import FILE

_FIX = "fetch the file again, or repair it"
_TEMPLATE = "chat_template.jinja"
_CONFIG, _GENERATION, _TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
_LARGEST_COMPANION = 2**28
"""Bytes. No tokenizer, template or licence comes near; weights and data are larger."""
_COMPANION_FOLDERS = ("additional_chat_templates",)
# By suffix: weights of any kind, training state, archives and code.
_LEFT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .ot .npz .npy .pkl .pickle .gguf .ggml .onnx "
    ".onnx_data .tflite .mlmodel .nemo .distcp .zip .tar .gz .xz .bz2 .zst .7z .parquet .arrow "
    ".py .pyc .so .sh .ipynb .log".split()
)
# By name: what describes the source's own weights, shape or training.
_LEFT_NAMES = frozenset(
    {
        _CONFIG,
        "adapter_config.json",
        "all_results.json",
        "cpt.json",
        "eval_results.json",
        "finetune.json",
        "hf_quant_config.json",
        "latest",
        "params.json",
        "quant_config.json",
        "quantization_config.json",
        "quantize_config.json",
        "run.json",
        "shear.json",
        "train_results.json",
        "trainer_state.json",
    }
)
_LEFT_ENDINGS = (".index.json", "readme.md")
_LEFT_STARTS = (".", "model.safetensors", "events.out.tfevents")


def widen(folder: Path) -> None:
    """Adds to config.json and tokenizer_config.json of `folder` what transformers 4 reads.

    The folder means the same in transformers 5. Raises InputError when a file cannot be used,
    OSError when it cannot be written.
    """
    for name, change in ((_CONFIG, _widen_config), (_TOKENIZER, _widen_tokenizer)):
        path = folder / name
        if path.is_file():
            values = read_json(path, _FIX)
            widened = change(values)
            if widened != values:
                write_text(path, json.dumps(widened, indent=2) + "\n")


def _widen_config(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with dtype and rotary settings also under the names that transformers 4 knows."""
    added: dict[str, Any] = {}
    if values.get("dtype") is not None:
        added["torch_dtype"] = values["dtype"]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        family = FAMILIES.get(str(values.get("model_type")).removesuffix(SUFFIX))
        names = {"rope_theta": "rope_theta"} if family is None else family.legacy_rope_keys
        added |= {names[key]: rope[key] for key in names if key in rope}
        scaled = rope.get("rope_type", "default") != "default"
        # transformers 5 takes this one first where it holds anything, completed by the keys above.
        own = {key: rope[key] for key in rope if key not in ("rope_theta", "partial_rotary_factor")}
        added["rope_scaling"] = own if scaled else None
    return values | added


def _widen_tokenizer(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the names that both versions of transformers have."""
    widened = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        widened["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        extra = widened.pop("extra_special_tokens")
        # Of two lists transformers 5 takes this one, unless it is empty.
        if extra or "additional_special_tokens" not in values:
            widened["additional_special_tokens"] = extra
    return widened


def companions(folder: Path) -> tuple[list[Path], list[str]]:
    """What of a model folder goes with a model made from it, and the names of what stays.

    Tokenizer, templates, generation and processor settings, licence and files of any other name go,
    as paths relative to `folder`. Weights, code, training state, the model card and what describes
    the source's own shape or training stay, as do hidden files and folders. Of code only a file
    that tokenizer_config.json names goes; nothing here runs it.
    """
    code = _named_code(folder)
    taken: list[Path] = []
    left = []
    for path in sorted(folder.iterdir()):
        if path.name in _COMPANION_FOLDERS and path.is_dir():
            inner = (file.relative_to(folder) for file in sorted(path.iterdir()) if file.is_file())
            taken += inner
        elif path.name in code or _travels(path):
            taken.append(path.relative_to(folder))
        elif path.name != _CONFIG and not path.name.startswith("."):
            left.append(path.name)
    return taken, left


def _travels(path: Path) -> bool:
    name = path.name.lower()
    by_name = name in _LEFT_NAMES or name.endswith(_LEFT_ENDINGS) or name.startswith(_LEFT_STARTS)
    if by_name or path.suffix.lower() in _LEFT_SUFFIXES or not path.is_file():
        return False
    return path.stat().st_size <= _LARGEST_COMPANION


def _named_code(folder: Path) -> set[str]:
    """The .py files in which tokenizer_config.json says that its tokenizer is."""
    path = folder / _TOKENIZER
    named = read_json(path, _FIX).get("auto_map") if path.is_file() else None
    entries = named.values() if isinstance(named, dict) else ()
    flat = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
    modules = {str(one).rpartition("--")[2].partition(".")[0] for one in flat if one}
    return {f"{module}.py" for module in modules}


def copy_companions(source: Path, target: Path) -> None:
    """Copies the companions of the model in `source` to `target`, and says what stays there.

    Raises OSError when a file cannot be copied.
    """
    taken, left = companions(source)
    for name in taken:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    others = [name for name in left if not name.endswith((".safetensors", ".index.json", FILE))]
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        logger.info(f"{source}: not copied to the new model: {shown}")


def add_chat(chat: ChatRecord, folder: Path) -> None:
    """Makes the template of `chat` that of the tokenizer in `folder`, and has generation stop where
    it ends an answer.

    Raises InputError when a file there cannot be used, OSError when one cannot be written.
    """
    write_text(folder / _TEMPLATE, chat.template)
    tokenizer = folder / _TOKENIZER
    if tokenizer.is_file():
        values = read_json(tokenizer, _FIX)
        # transformers takes the file; what reads this key alone would take another one.
        if values.pop("chat_template", None) is not None:
            write_text(tokenizer, json.dumps(values, indent=2) + "\n")
    if chat.end_of_turn is None:
        return
    generation, config = folder / _GENERATION, read_json(folder / _CONFIG, _FIX)
    # Without the file transformers takes these of the config.
    names = (f"{token}_token_id" for token in ("bos", "eos", "pad"))
    values = {name: config[name] for name in names if config.get(name) is not None}
    if generation.is_file():
        values = read_json(generation, _FIX)
    ends = values.get("eos_token_id", [])
    known = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    if chat.end_of_turn not in known:
        # With this key transformers may make the values anew from the model's config.
        values.pop("_from_model_config", None)
        every = [chat.end_of_turn, *known]
        write_text(generation, json.dumps(values | {"eos_token_id": every}, indent=2) + "\n")


def require_loadable(config: ModelConfig, source: Path) -> None:
    """Raises InputError unless transformers can build what would be saved of `config`, with the
    companions of the model folder `source`.

    Builds the model on the meta device: no weights, a fraction of a second.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    hf_config = config.to_hf()
    pad = hf_config.pad_token_id
    if pad is not None and not -config.vocab_size <= pad < config.vocab_size:
        raise InputError(
            f"{source / _CONFIG}: pad_token_id is {pad}, and the model's {config.vocab_size} ids "
            f"end at {config.vocab_size - 1}: transformers cannot build such a model. Set it to "
            "null there, or to an id that exists, such as eos_token_id"
        )
    try:
        ModelConfig.from_hf(_widen_config(json.loads(hf_config.to_json_string())))
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    except Exception as error:  # torch and transformers raise many types
        if sys.flags.optimize > 1:
            raise InputError(
                "transformers does not work where Python leaves out docstrings: start without -OO, "
                "and unset PYTHONOPTIMIZE or set it to 1"
            ) from error
        reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
        raise InputError(
            f"transformers cannot build a model with the settings of {source / _CONFIG}: "
            f"{reason}; correct them there"
        ) from error
    taken, _ = companions(source)
    for file in taken:
        if not os.access(source / file, os.R_OK):
            raise InputError(
                f"{source / file}: it goes along with the new model and cannot be read; change its "
                "permissions, or move it elsewhere"
            )
    for name in (_GENERATION, _TOKENIZER):
        if Path(name) in taken:
            read_json(source / name, f"{_FIX}, or remove it")
            require_no_mark(source / name)
    if Path(_GENERATION) in taken:
        try:
            GenerationConfig.from_pretrained(str(source), local_files_only=True)
        except Exception as error:
            reason = shortened(" ".join(str(error).split()) or type(error).__name__, 300)
            raise InputError(
                f"{source / _GENERATION}: transformers refuses it ({reason}); correct or remove it"
            ) from error
