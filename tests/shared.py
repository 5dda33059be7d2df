"""Fixtures of several files, as a plugin: a file that takes them says pytest_plugins = ["shared"]."""
import common
import pytest


@pytest.fixture(scope="session")
def small_vignettes(tmp_path_factory):
    """A file with every twelfth of the probe's items."""
    return common.few_vignettes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory, small_vignettes):
    """The record of a run of one accepted round. Whoever changes its folder takes a copy."""
    code, record = common.run_loop(tmp_path_factory.mktemp("runs"), small_vignettes, "--no-gate")
    assert code == 0
    return record
