"""Start-up: whole processes, a JSON line each; the peer, gguf-py's reader, in the same run.

    python scripts/bench/bench_startup.py [--repeats 5]

inspect, help: median seconds of the process. first_byte: seconds from the start of a process to the first weights
converted, kernels compiled already. convert: from nothing to an output of 6 MB of the tiny model, with all kernels
compiled; convert_first: on a fresh machine, where they are compiled while the model is run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
import real_models

GGUF_PY = "import sys, gguf; gguf.GGUFReader(sys.argv[1])"
FIRST_BYTE = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
from requant.common.monitor import Monitor
from requant.container.source import open_source
from requant.conversion.convert import convert
from requant.planning.recipe import uniform_plan

def first(n_bytes):
    print(time.time() - float(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)

with open_source(Path(sys.argv[2])) as source:
    monitor = Monitor(progress=lambda *_: nullcontext(first))
    convert(source, uniform_plan(source, "Q4_K"), Path(sys.argv[3]) / "out.gguf", monitor=monitor)
"""


def seconds(*command: str, **environment: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return time.perf_counter() - start


def first_byte(folder: str) -> float:
    command = [sys.executable, "-c", FIRST_BYTE, str(time.time()), str(real_models.TINY), folder]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    gemma, python = str(real_models.gemma3()), sys.executable
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "inspect": lambda: seconds(python, "-m", "requant", "inspect", gemma),
            "help": lambda: seconds(python, "-m", "requant", "--help"),
            "first_byte": lambda: first_byte(folder),
        }
        for name, run in runs.items():
            run()
            print(json.dumps({"what": name, "seconds": round(statistics.median(run() for _ in range(repeats)), 3)}))
        print(json.dumps({"what": "gguf-py reader", "seconds": round(seconds(python, "-c", GGUF_PY, gemma), 3)}))
        convert = (python, "-m", "requant", "convert", str(real_models.TINY), f"{folder}/out.gguf", "--size", "6MB")
        for name in ("convert_first", "convert"):
            took = seconds(*convert, "--force", REQUANT_CACHE_DIR=f"{folder}/kernels")
            print(json.dumps({"what": name, "seconds": round(took, 1)}))


if __name__ == "__main__":
    main()
