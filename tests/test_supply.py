"""What is installed beside requant: the hashed locks agree with pyproject.toml, and the SBOM with the lock."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = {
    "requirements.lock": PROJECT["dependencies"],
    "requirements-calibrate.lock": PROJECT["dependencies"] + PROJECT["optional-dependencies"]["calibrate"],
}
PYTHONS = ("3.10.14", "3.11.9", "3.12.4", "3.13.1")
SYSTEMS = (("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64"), ("win32", "Windows", "AMD64"))


def requirements(lock):
    """[(requirement, its hashes)] of a lock; every line of it is one, a hash, or a comment."""
    found = []
    for line in (ROOT / lock).read_text(encoding="utf-8").splitlines():
        text = line.removesuffix("\\").strip()
        if text.startswith("--hash="):
            found[-1][1].append(text.removeprefix("--hash="))
        elif text and not text.startswith("#"):
            found.append((Requirement(text), []))
    return found


def applies(requirement, python, system):
    platform, name, machine = system
    environment = {"python_full_version": python, "python_version": python.rpartition(".")[0], "extra": ""}
    environment |= {"sys_platform": platform, "platform_system": name, "platform_machine": machine}
    return requirement.marker is None or Marker(str(requirement.marker)).evaluate(environment)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_of_a_lock_is_one_version_with_its_hashes(lock):
    found = requirements(lock)
    assert len(found) > 6
    for requirement, hashes in found:
        assert [s.operator for s in requirement.specifier] == ["=="] and not requirement.url, requirement.name
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", h) for h in hashes), requirement.name


@pytest.mark.parametrize("system", SYSTEMS, ids=[s[0] for s in SYSTEMS])
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_the_project_asks_for_everywhere(lock, python, system):
    here = [r for r, _ in requirements(lock) if applies(r, python, system)]
    versions = {r.name: next(iter(r.specifier)).version for r in here}
    assert len(versions) == len(here)  # one version each
    for wanted in filter(lambda r: applies(r, python, system), map(Requirement, LOCKS[lock])):
        assert wanted.name in versions and versions[wanted.name] in wanted.specifier, wanted


def test_the_larger_lock_has_the_versions_of_the_smaller():
    small, large = ({str(r) for r, _ in requirements(lock)} for lock in LOCKS)
    assert small < large


def test_the_sbom_is_valid_and_has_what_the_lock_has():
    words = [sys.executable, ROOT / "scripts" / "ci" / "sbom.py"]
    first, second = (subprocess.run(words, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    found = json.loads(first)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    listed = {
        c["purl"]: [h["content"] for r in c["externalReferences"] for h in r["hashes"]] for c in found["components"]
    }
    locked = {
        f"pkg:pypi/{r.name}@{next(iter(r.specifier)).version}": [h.removeprefix("sha256:") for h in hashes]
        for r, hashes in requirements("requirements.lock")
    }
    assert {purl: sorted(hashes) for purl, hashes in listed.items()} == {k: sorted(v) for k, v in locked.items()}
    needs = {d["ref"]: d["dependsOn"] for d in found["dependencies"]}
    direct = {ref.partition("==")[0] for ref in needs["root-component"]}
    assert direct == {Requirement(text).name for text in PROJECT["dependencies"]}
    assert any(ref.startswith("llvmlite==") for ref in needs[next(ref for ref in needs if ref.startswith("numba=="))])
