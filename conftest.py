"""Fixtures of several rooms. What they are made of is in common.py."""
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent / folder) for folder in (".", "tests")]

import common                                                   # noqa: E402


@pytest.fixture(scope="session")
def small_vignettes(tmp_path_factory):
    """A file with every twelfth of the probe's items."""
    return common.few_vignettes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_vignettes):
    """(exit code, record) of a run of one accepted round."""
    return common.run_loop(tmp_path_factory.mktemp("runs"), small_vignettes, "--no-gate")
