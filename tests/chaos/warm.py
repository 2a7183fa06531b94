"""Runs a command in a process forked from one that has imported everything already.

Importing torch takes seconds of every start, and a disturbed run starts many times. What is forked
is a process of its own with its own session, signals and descriptors; it runs the same `main` as
the command line.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import sys

import torch

from data import cli

EVERYTHING = (
    *("data.tokenize", "launch.cpt", "pruner.run", "pruner.shear", "trainer.cpt"),
    *("launch.finetune", "trainer.finetune", "peft"),
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.utils.tensorboard", "tyro"),
    *("torch.distributed.fsdp", "pyarrow.parquet", "rich.progress", "sentencepiece", "tokenizers"),
)
"""Modules that commands import, most of them late."""
CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM")
"""Those of transformers, which imports each when it is first asked for."""
MODULES = {
    "shear": "pruner.shear",
    "cpt": "launch.cpt",
    "finetune": "launch.finetune",
    "tokenize": "data.tokenize",
}

for _name in EVERYTHING:
    with contextlib.suppress(ImportError):  # some are optional
        importlib.import_module(_name)
for _name in CLASSES:
    getattr(importlib.import_module("transformers"), _name)
# What importing left behind would be collected in the forked process, where destructors swallow a
# Ctrl-C.
gc.collect()


def start(
    command: str,
    words: list[str],
    environment: dict[str, str],
    log: str,
    disk: tuple[int, str] | None,
    largest_file: int | None,
) -> None:
    """The whole life of the process; ends by SystemExit.

    Args:
        command: a key of MODULES.
        words: its arguments.
        environment: variables that are set besides.
        log: file that stdout and stderr go to.
        disk: bytes that may be written into a folder, and the folder.
        largest_file: bytes of the largest file that may be written, as `ulimit -f` sets it.
    """
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = [f"shorn {command}", *words]
    torch.set_num_threads(1)
    if disk is not None:
        os.environ["CHAOS_DISK"] = f"{disk[0]}:{disk[1]}"  # for processes that this one starts
        ctypes.CDLL(None).chaos_fill_disk(ctypes.c_long(disk[0]), disk[1].encode())
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    main = importlib.import_module(MODULES[command]).main
    os.write(1, b"started\n")
    cli.run(lambda: main(words))
