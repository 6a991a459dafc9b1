"""Mutate the code that keeps files whole, and see how much of it the tests notice; a JSON line for each module.

    python scripts/ci/mutation.py [--jobs N] [--work FOLDER] [--least PERCENT] [MUTANT...]

Runs mutmut (`pip install mutmut`), as [tool.mutmut] of pyproject.toml says, on a copy of what git knows of the project.
In a FOLDER of an earlier run only what has changed is done again. Survivors are listed; docs/reliability.md says why
they may live. The exit code is 1 where less than PERCENT of a module's mutants are killed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
KILLED, SURVIVED = {1, 3}, {0, 33}  # mutmut's codes; 33 is for what no test runs. The rest are timeouts


def copy_to(folder):
    """What git knows of the project, as it is now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0")[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def results(folder):
    """{module: {mutant: code}} of all that have been run."""
    found = {}
    for path in sorted((folder / "mutants").rglob("*.py.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        found[path.name.removesuffix(".py.meta")] = {name: code for name, code in codes.items() if code is not None}
    return {module: codes for module, codes in found.items() if codes}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where to run; a temporary folder by default")
    parser.add_argument("--least", type=float, default=90.0)
    parser.add_argument("mutants", nargs="*", help="names or patterns of mutmut's")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="mutation-"))
    work.mkdir(parents=True, exist_ok=True)
    copy_to(work)
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(given.jobs), *given.mutants]
    ran = subprocess.run(command, cwd=work, preexec_fn=lambda: os.nice(10), stdout=sys.stderr, check=False)
    failed = ran.returncode != 0
    for module, codes in results(work).items():
        alive = sorted(name for name, code in codes.items() if code in SURVIVED)
        n_killed = sum(code in KILLED for code in codes.values())
        percent = 100 * (len(codes) - len(alive)) / len(codes)
        failed |= percent < given.least
        figures = {"mutants": len(codes), "killed": n_killed, "timeout": len(codes) - n_killed - len(alive)}
        print(json.dumps({"what": "mutation", "module": module, **figures, "survived": len(alive)}))
        print(json.dumps({"what": "survivors", "module": module, "percent killed": round(percent, 1), "names": alive}))
    if given.work is None:
        shutil.rmtree(work)
    sys.exit(failed)


if __name__ == "__main__":
    main()
