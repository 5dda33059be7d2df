"""Fixtures of several files, as a plugin: a file that takes them says pytest_plugins = ["shared"]."""
import common
import pytest
from tools import inputs


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The record of a run of one accepted round. Whoever changes its folder takes a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "POCKET", inputs.POCKET)          # small_data sets it
        vignettes = common.small_data(tmp_path_factory.mktemp("data"))
        code, record = common.run_loop(tmp_path_factory.mktemp("runs"), vignettes, "--no-gate")
    assert code == 0
    return record
