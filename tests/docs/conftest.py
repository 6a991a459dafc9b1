"""Helpers of the command line's tests, for the commands of the documentation."""

import pytest


@pytest.fixture
def sandbox(tmp_path, tmp_path_factory, monkeypatch):
    """An empty folder with the models that the documentation speaks of, as the current one."""
    from doc_models import furnish

    folder = tmp_path / "sandbox"
    folder.mkdir()
    furnish(folder, tmp_path_factory.getbasetemp())
    monkeypatch.chdir(folder)
    return folder
