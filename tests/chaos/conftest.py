"""Inputs of the tests of damaged files and disturbed runs."""

import pytest

from tests.chaos.workspace import Workspace, make_workspace


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Model, text, tokens, and a finished run of each command that trains."""
    return make_workspace(tmp_path_factory.mktemp("chaos"))
