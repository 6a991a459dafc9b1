"""The picture that docs/publishing.md shows: a plan of the tiny model in 11 MiB of VRAM.

python scripts/plan_picture.py [-o docs/images]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = ROOT / "fixtures" / "tiny-llama-f16.gguf"


def requant(*words):
    run = [sys.executable, "-m", "requant", *map(str, words)]
    return subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "images")
    folder = parser.parse_args().output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        plan = Path(work) / "plan.json"
        requant("plan", TINY, "--vram", "11MiB", "--ctx", "512", "-o", plan)
        print(requant("report", plan, "-o", folder / "report-picture.png", "--force"), end="")


if __name__ == "__main__":
    main()
