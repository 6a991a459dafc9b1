"""The count of skipped tests: what is not on the list fails the run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = {
    "expected": ("import pytest\ndef test_a():\n    pytest.skip('no such disk, here')", 0, "expected: 1"),
    "for another reason": ("import pytest\ndef test_a():\n    pytest.skip('lazy')", 1, "SKIP of test_it.py::test_a: "),
    "any of a file": ("import pytest\n@pytest.mark.skip(reason='no such disk')\ndef test_c(): pass", 0, "expected: 1"),
    "any, otherwise": (
        "import pytest\n@pytest.mark.skip(reason='lazy')\ndef test_c(): pass",
        1,
        "SKIP of test_it.py::",
    ),
    "another test": ("import pytest\n@pytest.mark.skip\ndef test_b(): pass\ndef test_c(): pass", 1, "test_b: "),
    "a whole file": ("import pytest\npytest.importorskip('nowhere_at_all')\ndef test_a(): pass", 1, "test_it.py: "),
    "none": ("import pytest\n@pytest.mark.xfail\ndef test_a(): assert 0\ndef test_c(): pass", 0, "skipped: 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_skip_that_is_not_expected_fails_the_run(tmp_path, case):
    code, exit_code, said = CASES[case]
    shutil.copy(HERE / "conftest.py", tmp_path)
    which = "*" if case.startswith("any") else "test_a"
    (tmp_path / "expected_skips.txt").write_text(f"# a comment\ntest_it.py::{which}: no such disk\n")
    (tmp_path / "test_it.py").write_text(code)
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_it.py"]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == exit_code and said in run.stdout, run.stdout + run.stderr


def test_the_list_names_tests_that_are_there():
    for line in (HERE / "expected_skips.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            path, name = line.split(": ")[0].split("::")
            text = (HERE.parent / path).read_text()
            assert ("def test_" if name == "*" else f"def {name.split('[')[0]}(") in text
