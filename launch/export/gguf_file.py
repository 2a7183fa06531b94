"""One GGUF file: what goes into it, how large it will be, and its writing tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.errors import InputError
from data.progress import Progress
from launch.export.architecture import add_settings, architecture_of, tensors_of, unfit
from launch.export.vocabulary import Vocabulary
from trainer.models.config import ModelConfig
from trainer.models.decoder import CausalLM

MODEL = "shorn.model"
"""Key under which a file of ours says of which model it was made."""
BLOCK = 32
"""Weights of a row that share a scale in the types that quantize."""
PLAIN = ("f32", "f16", "bf16")
MOST_F16 = 65504.0
"""The largest number of f16."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A file to be written."""

    path: Path
    type: str
    """f32, f16, bf16, q8_0 …"""
    architecture: str
    model: str
    """Tells weights, tokenizer and settings of the model from any other's."""
    title: str
    """The model's name in the file."""


def require_shape(model: ModelConfig, kind: str) -> None:
    """Raises InputError for a model whose rows the type `kind` cannot hold."""
    wrong = {} if kind in PLAIN else unfit(model, BLOCK)
    if wrong:
        sizes = " and ".join(f"{name} {size}" for name, size in wrong.items())
        raise InputError(
            f"--to gguf-{kind}: {sizes} is no multiple of {BLOCK}, the weights of a row that share "
            f"a scale; use --to gguf-f16, or prune to multiples of {BLOCK} (`shorn shear --propose "
            "… --align` gives such sizes)"
        )


def type_of(name: str, value: Tensor, kind: str) -> str:
    """The type of one tensor in a file of type `kind`: vectors stay fp32, and what ids look up and
    what predicts them keeps eight bits."""
    if value.ndim == 1 or kind == "f32":
        return "f32"
    if kind not in PLAIN and name in ("token_embd.weight", "output.weight"):
        return "q8_0"
    return kind


def encoded(value: Tensor, kind: str) -> np.ndarray:
    """A tensor as a file of type `kind` stores it. Raises InputError for what f16 cannot hold."""
    from gguf import GGMLQuantizationType, quants

    plain: np.ndarray = value.detach().float().numpy()
    if kind == "f32":
        return plain
    if kind == "f16":
        largest = float(np.abs(plain).max(initial=0.0))
        if largest > MOST_F16:
            raise InputError(
                f"--to gguf-f16: the weights reach {largest:,.0f}, beyond what f16 holds (65,504); "
                "use --to gguf-bf16"
            )
        return plain.astype(np.float16)
    stored: np.ndarray = quants.quantize(plain, GGMLQuantizationType[kind.upper()])
    return stored


def bytes_of(model: CausalLM, kind: str) -> int:
    """Bytes of all tensors in a file of type `kind`."""
    return sum(
        _stored_bytes(value, type_of(name, value, kind)) for name, value in tensors_of(model)
    )


def _stored_bytes(value: Tensor, kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return value.numel() // weights * size


def write(plan: Plan, path: Path, model: CausalLM, vocabulary: Vocabulary) -> None:
    """Writes the file at `path`. Raises OSError where that fails."""
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(plan.title)
        writer.add_size_label(_size_label(model.config.num_parameters()))
        writer.add_file_type(_file_type(plan.type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(MODEL, plan.model)
        add_settings(writer, model.config)
        vocabulary.add_to(writer)
        for name, value in tensors_of(model):
            kind = type_of(name, value, plan.type)
            raw = gguf.GGMLQuantizationType[kind.upper()]
            # The type tells what is stored, so the NumPy type has no part in it.
            shape, size = tuple(value.shape), _stored_bytes(value, kind)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = sum(value.numel() for _, value in tensors_of(model))
        with Progress(f"write {plan.type}", total=total, unit="weight") as bar:
            for name, value in tensors_of(model):
                writer.write_tensor_data(encoded(value, type_of(name, value, plan.type)))
                bar.update(value.numel())
        writer.flush()
    finally:
        writer.close()


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values, as fp32, of all tensors in a file."""
    from gguf import GGUFReader, quants

    for tensor in GGUFReader(path).tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield tensor.name, quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def made_of(path: Path) -> dict[str, Any] | None:
    """Model and type that a file of ours names; None for any other file."""
    from gguf import GGUFReader, LlamaFileType

    try:
        fields = GGUFReader(path).fields
    # The library raises what a file that is none happens to make it raise.
    except Exception:
        return None
    if MODEL not in fields or "general.file_type" not in fields:
        return None
    kind = LlamaFileType(fields["general.file_type"].contents()).name
    return {"model": fields[MODEL].contents(), "type": kind.partition("_")[2].lower()}


def _file_type(kind: str) -> int:
    from gguf import LlamaFileType

    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(LlamaFileType[name])


def _size_label(parameters: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


def plan_of(path: Path, kind: str, shape: ModelConfig, model: str, title: str) -> Plan:
    """The file of type `kind`. Raises InputError for a model that cannot be put into one."""
    require_shape(shape, kind)
    return Plan(path, kind, architecture_of(shape), model, title)
