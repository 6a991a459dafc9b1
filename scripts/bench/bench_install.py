"""What an installation takes: MiB per package, plain and with each extra, and seconds of short commands in it.

    python scripts/bench/bench_install.py [--repeats 9]

Builds the wheel and installs it with pip into new environments, from the index that pip is set to. Sizes are of the
files that pip lists, bytecode included, without the environment itself and pip. Seconds are medians of whole processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "fixtures" / "tiny-llama-f16.gguf"
FOR_USERS = ("calibrate", "cluster", "report")
SIZES = """
import importlib.metadata as m, json
print(json.dumps({d.metadata["Name"]: sum(p.locate().stat().st_size for p in d.files if p.locate().is_file())
                  for d in m.distributions() if d.metadata["Name"] not in ("pip", "setuptools")}))
"""
EXTRAS = 'import importlib.metadata as m, json; print(json.dumps(m.metadata("requant").get_all("Provides-Extra")))'


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT.parent).stdout


def installed(folder: Path, requirement: str) -> tuple[Path, dict[str, int]]:
    """The folder of programs of a new environment with `requirement` in it, and the bytes of each package."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    output_of(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement)
    return folder / "bin", json.loads(output_of(python, "-I", "-c", SIZES))


def seconds(repeats: int, *command: str | Path) -> float:
    times = []
    for _ in range(repeats + 1):  # the first is not counted
        start = time.perf_counter()
        output_of(*command)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    print(f"| {head[0]} | {head[1]} |\n|---|--:|")
    for row in rows:
        print(f"| {row[0]} | {row[1]} |")
    print()


def mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "build", with_pip=True)
        output_of(folder / "build/bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
        (wheel,) = folder.glob("*.whl")
        programs, plain = installed(folder / "plain", str(wheel))
        rows = [(package, mib(size)) for package, size in sorted(plain.items(), key=lambda item: -item[1])]
        rows.append(("together", mib(sum(plain.values()))))
        for extra in json.loads(output_of(programs / "python", "-c", EXTRAS)):
            if extra in FOR_USERS:
                _, more = installed(folder / extra, f"{wheel}[{extra}]")
                new = more.keys() - plain.keys()
                rows.append((f"`[{extra}]`: {len(new)} more", mib(sum(more[package] for package in new))))
        table(("package", "MiB"), rows)
        requant, python = programs / "requant", programs / "python"
        os.environ["REQUANT_CACHE_DIR"] = str(folder / "kernels")  # new, like the rest
        runs = {
            "`python -c pass`": (python, "-c", "pass"),
            "`import requant`": (python, "-c", "import requant"),
            "`requant --help`": (requant, "--help"),
            "`requant --version`": (requant, "--version"),
            "`requant inspect` of the tiny model": (requant, "inspect", TINY),
            "the solver loaded, as by `plan`": (
                python,
                "-c",
                "import requant.planning.solver.solve, requant.planning.solver.knapsack",
            ),
            "Numba loaded, as by `convert`": (python, "-c", "import requant.formats.jit"),
        }
        table(("", "seconds"), [(what, f"{seconds(repeats, *command):.2f}") for what, command in runs.items()])


if __name__ == "__main__":
    main()
