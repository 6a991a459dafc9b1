"""The wheel and the sdist: what is in them, what they say of themselves, and that they are the same bytes again."""

import email
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from test_supply import PROJECT, PYTHONS

import requant

ROOT = Path(__file__).parents[1]
STEM = f"requant-{requant.__version__}"
WHEEL, SDIST = f"{STEM}-py3-none-any.whl", f"{STEM}.tar.gz"
FOLDERS = ("requant", "tests", "fixtures", "scripts", "docs")
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md", "requirements.lock")
TOP = {"PKG-INFO", ".gitignore", ".ci", "mkdocs.yml", "requirements-calibrate.lock", "requirements-build.lock"}
LEFT_BY_TOOLS = ("__pycache__", ".hypothesis", ".pytest_cache", "site")


def build(root, folder, *targets):
    """The paths of a wheel and an sdist of the project at `root`, with what this environment has and no network."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), *targets]
    variables = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    built = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder / WHEEL, folder / SDIST


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The sdist's folder, its files written now and readable by their owner only."""
    folder, umask = tmp_path_factory.mktemp("sdist"), os.umask(0o077)
    try:
        with tarfile.open(built[1]) as archive:
            for member in archive.getmembers():
                target = folder / member.name
                assert target.resolve().is_relative_to(folder) and member.isfile(), member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
                target.chmod(member.mode & 0o700)
    finally:
        os.umask(umask)
    return folder / STEM


def files(root):
    return {
        path.relative_to(ROOT).as_posix()
        for path in root.rglob("*")
        if path.is_file() and not set(LEFT_BY_TOOLS) & set(path.parts) and path.suffix != ".part"
    }


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"{STEM}.dist-info/METADATA"))


def test_the_wheel_has_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as archive:
        held = {name for name in archive.namelist() if not name.startswith(f"{STEM}.dist-info/")}
        about = {name.partition("/")[2] for name in archive.namelist()} - {n.partition("/")[2] for n in held}
        scripts = archive.read(f"{STEM}.dist-info/entry_points.txt").decode()
    assert held == files(ROOT / "requant")
    assert {"requant/py.typed", "requant/scoring/calibration.txt", "requant/formats/grids.npz"} <= held
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} == about
    assert scripts.split() == ["[console_scripts]", "requant", "=", "requant.cli:run"]


def test_the_sdist_has_all_that_tests_and_scripts_need(built):
    with tarfile.open(built[1]) as archive:
        held = {member.name.removeprefix(f"{STEM}/") for member in archive.getmembers()}
    wanted = set(FILES).union(*(files(ROOT / name) for name in FOLDERS))
    assert wanted <= held
    assert {name.partition("/")[0] for name in held} <= {*FOLDERS, *FILES, *TOP}
    assert not [name for name in held if set(LEFT_BY_TOOLS) & set(Path(name).parts)]


def test_the_metadata_are_those_of_the_project(built):
    said = metadata(built[0])
    assert (said["Name"], said["Version"]) == ("requant", requant.__version__)
    assert (said["License-Expression"], said.get_all("License-File")) == ("MIT", ["LICENSE"])
    assert said["Description-Content-Type"] == "text/markdown"
    assert (
        said.get_payload(decode=True).decode("utf-8").strip()
        == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    )
    needed = [Requirement(text) for text in said.get_all("Requires-Dist") if "extra ==" not in text]
    assert sorted(map(str, needed)) == sorted(str(Requirement(text)) for text in PROJECT["dependencies"])
    assert {"calibrate", "cluster"} <= set(said.get_all("Provides-Extra"))


def test_the_pythons_that_it_is_for_are_the_ones_that_are_locked(built):
    said = metadata(built[0])
    listed = {text.rpartition(" ")[2] for text in said.get_all("Classifier") if "Python :: 3." in text}
    assert listed == {text.rpartition(".")[0] for text in PYTHONS}
    allowed = SpecifierSet(said["Requires-Python"])
    assert all(text in allowed for text in PYTHONS) and "3.9.25" not in allowed
    assert min(map(Version, listed)) == Version(PROJECT["requires-python"].removeprefix(">="))


def test_a_build_is_the_same_bytes_wherever_and_whenever(built, unpacked, tmp_path):
    again = build(unpacked, tmp_path)
    assert again[0].read_bytes() == built[0].read_bytes()
    assert again[1].read_bytes() == built[1].read_bytes()


def test_the_tests_run_from_the_sdist(unpacked):
    variables = os.environ | {"PYTHONPATH": str(unpacked)}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/common/test_units.py",
        "tests/test_house.py",
    ]
    ran = subprocess.run(words, cwd=unpacked, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout + ran.stderr
    assert all(os.system(f"sh -n '{path}'") == 0 for path in (unpacked / "scripts").glob("*.sh"))


@pytest.mark.slow
def test_the_wheel_installs_runs_and_leaves_nothing_behind(built, tmp_path):
    """In an environment of its own, which borrows the packages that requant needs from this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(str(Path(pytest.__file__).parents[1]), encoding="utf-8")
    before, bin_before = set(site.iterdir()), set((tmp_path / "venv" / "bin").iterdir())
    tool = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*words):
        return subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout

    run(*tool, "install", "--no-index", "--no-deps", "--ignore-installed", built[0])
    command = tmp_path / "venv" / "bin" / "requant"
    assert run(command, "--version").startswith(f"requant {requant.__version__}\n")
    assert "Q4_K" in run(command, "convert", "--help")
    where = run(tmp_path / "venv" / "bin" / "python", "-c", "import requant; print(requant.__file__)")
    assert Path(where).is_relative_to(site)
    run(*tool, "uninstall", "--yes", "requant")
    assert set(site.iterdir()) - {site / "__pycache__"} == before
    assert set((tmp_path / "venv" / "bin").iterdir()) == bin_before
