"""Versions: what `requant --version` says, where it says it from, and the compiled kernels of versions gone by."""

import ctypes
import json
import re
import sys
from pathlib import Path

import ggml
import pytest
from packaging.requirements import Requirement

import requant
from requant.formats import FORMATS, GGML, KERNELS, kernel_cache, table_digest, versions
from requant.report.text.versions import versions_json, versions_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_AT_RUN_TIME = ("test", "bench", "fuzz", "dev", "supply", "docs")


def folder_of(parent, state, content=b"x" * 1000):
    folder = parent / kernel_cache.folder_name(state)
    (folder / "formats_1").mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    (folder / "formats_1" / "a.nbi").write_bytes(content)
    (folder / "formats_1" / "a.1.nbc").write_bytes(content)
    return folder


@pytest.fixture
def parents(tmp_path, monkeypatch):
    """The two places that folders of kernels may be in, private."""
    home, shared = tmp_path / "home", tmp_path / "tmp"
    monkeypatch.setattr(kernel_cache, "parents", lambda: [home, shared])
    for path in (home, shared):
        path.mkdir(mode=0o700)
    return home, shared


def test_the_version_is_said_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", requant.__version__)
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert f"## {requant.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_packages_are_those_that_requant_asks_for():
    asked = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert set(versions.PACKAGES) == asked - {"tomli"} | {"llvmlite"}  # numba's compiler
    extras = PROJECT["optional-dependencies"]
    optional = {Requirement(text).name for name in extras if name not in NOT_AT_RUN_TIME for text in extras[name]}
    assert optional - {"requant"} <= set(versions.OPTIONAL)


def test_the_formats_are_of_the_ggml_that_they_are_compared_with():
    library = ggml.library()
    library.ggml_version.restype = ctypes.c_char_p
    assert library.ggml_version().decode() == GGML


def test_versions_name_encoders_formats_and_packages():
    found = versions.versions()
    assert (found.requant, found.kernels, found.ggml) == (requant.__version__, KERNELS, GGML)
    assert (found.n_types, found.formats) == (len(FORMATS), table_digest())
    assert set(versions.PACKAGES) <= found.packages.keys()
    text = versions_text(found)
    assert text.startswith(f"requant {requant.__version__}\n")
    assert all(f"{name} {version}" in text for name, version in found.packages.items())
    said = json.loads(versions_json(found))
    assert said["schema"] == "requant.version/1" and said["packages"] == found.packages


def test_kernels_that_are_kept_are_counted_by_version(parents):
    home, shared = parents
    assert kernel_cache.contents("now") == kernel_cache.Contents(None, 0, 0, 0, 0)
    own = folder_of(home, "now")
    folder_of(home, "before")
    folder_of(shared, "long-before", b"x" * 500)
    assert kernel_cache.contents("now") == kernel_cache.Contents(own, 1, 2000, 2, 3000)


def test_the_state_of_the_kernels_is_the_one_that_they_are_kept_under():
    import numba

    from requant.formats.jit import SOURCE_STATE

    assert kernel_cache.source_state(versions.versions().packages["numba"]) == SOURCE_STATE
    assert kernel_cache.source_state(numba.__version__ + "1") != SOURCE_STATE


def test_clearing_removes_all_kernels_and_nothing_else(parents):
    home, shared = parents
    gone = [folder_of(home, "now"), folder_of(home, "before"), folder_of(shared, "now")]
    (home / "kernels").mkdir()
    (home / "kernels-file").write_bytes(b"")
    elsewhere = folder_of(home.parent, "elsewhere")
    (home / "kernels-link").symlink_to(elsewhere)
    assert sorted(kernel_cache.clear()) == sorted(gone)
    assert not any(path.exists() for path in gone) and kernel_cache.clear() == []
    assert {p.name for p in home.iterdir()} == {"kernels", "kernels-file", "kernels-link"}
    assert (elsewhere / "formats_1" / "a.nbi").exists()


@pytest.mark.parametrize("which", ["parent", "folder"])
def test_a_folder_that_others_may_change_is_left_alone(parents, which):
    folder = folder_of(parents[0], "now")
    (parents[0] if which == "parent" else folder).chmod(0o777)
    assert kernel_cache.contents("now").n_kernels == 0
    assert kernel_cache.clear() == [] and folder.exists()
