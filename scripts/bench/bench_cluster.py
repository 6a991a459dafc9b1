"""Seconds of convert on a cluster of one and of two workers, and on as many threads here; the plan for hundreds.

    python scripts/bench/bench_cluster.py [--weights 4e8] [--repeats 3] [--types Q4_K,Q6_K,Q3_K,Q8_0,Q4_0]
    python scripts/bench/bench_cluster.py --plan [--rate 20e6]

A scheduler with one worker and one with two, each of one thread, run beside each other on loopback; the workers'
kernels are warm. Runs alternate, so that whatever else the machine does falls on all alike; a speedup is the median of
ratios of neighbours. The driver's own processor time is told too: on as many cores as workers it is what the
workers do not get. --plan computes the load of hundreds of workers, at `--rate` weights a second and thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).parent))
from bench_convert import plan_for, synthesize
from clusters import Machines

from requant.common.cluster import Cluster
from requant.container.source import open_source
from requant.conversion.chunks import PIECE_BYTES
from requant.conversion.convert import convert
from requant.conversion.options import ConversionOptions
from requant.conversion.prepare import formats_used
from requant.formats import codec
from requant.formats.jit import fingerprint

MODELS = {"70B dense": (70e9, 723, 8192 * 28672), "1T experts": (1e12, 1100, 384 * 7168 * 2048)}
OVERHEAD = 1e-3  # seconds of a scheduler per task, as Dask's documentation has it
SOURCE_BPW, OUTPUT_BPW = 16.0, 4.5
JOURNAL_LINE, TASK_BYTES = 400, 260e3  # of a record; of a task at most, most of it importance


def once(source: Path, out: Path, types: list[str], threads: int, address: str | None) -> tuple[float, float, str]:
    """Seconds, seconds of this process's processor, and the output's digest."""
    with open_source(source) as model:
        plan = plan_for(model, types)
        codec.warm_up(formats_used(plan))
        if address is None:
            start, cpu = time.perf_counter(), time.process_time()
            convert(model, plan, out, options=ConversionOptions(threads=threads, force=True))
        else:
            with Cluster(address, fingerprint) as cluster:
                start, cpu = time.perf_counter(), time.process_time()
                convert(model, plan, out, options=ConversionOptions(threads=threads, force=True, cluster=cluster))
        taken = time.perf_counter() - start, time.process_time() - cpu
    return *taken, hashlib.sha256(out.read_bytes()).hexdigest()


def bench(weights: float, repeats: int, types: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, out = folder / "model.gguf", folder / "out.gguf"
        synthesize(model, weights)
        for n in (1, 2):
            (folder / str(n)).mkdir()
        with Machines(folder / "1", 1) as one, Machines(folder / "2", 2) as two:
            ways = {"here_1": (1, None), "here_2": (2, None), "there_1": (1, one.address), "there_2": (1, two.address)}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            driver: list[float] = []
            digests = set()
            for turn in range(-1, repeats):  # the first warms the workers and the page cache
                for way, (threads, address) in ways.items():
                    taken, cpu, digest = once(model, out, types, threads, address)
                    digests.add(digest)
                    if turn >= 0:
                        seconds[way].append(taken)
                        driver += [cpu / taken] if address else []
                shown = {way: round(found[-1], 2) for way, found in seconds.items() if found}
                print(json.dumps({"turn": turn, "load": os.getloadavg()[0]} | shown), flush=True)
        line = {
            "weights": weights, "types": types, "repeats": repeats, "same_bytes": len(digests) == 1,
            **{f"seconds_{way}": round(median(found), 2) for way, found in seconds.items()},
            "speedup_here": ratio(seconds["here_1"], seconds["here_2"]),
            "speedup_there": ratio(seconds["there_1"], seconds["there_2"]),
            "there_over_here_1": ratio(seconds["there_1"], seconds["here_1"]),
            "driver_cpu_share": round(median(driver), 3),
            "mweights_per_second_and_worker": round(weights / median(seconds["there_1"]) / 1e6, 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def ratio(first: list[float], second: list[float]) -> float:
    return round(median(a / b for a, b in zip(first, second, strict=True)), 2)


def plans(rate: float) -> None:
    """The load of clusters: every figure follows from the rate, the sizes above and Dask's overhead per task."""
    for name, (weights, tensors, largest) in MODELS.items():
        output, source = weights * OUTPUT_BPW / 8, weights * SOURCE_BPW / 8
        per_task = PIECE_BYTES * 8 / OUTPUT_BPW
        tasks = weights / per_task + 3 * tensors  # a piece more, a digest and a verification for each tensor
        for workers in (8, 64, 256, 512, 1024):
            seconds = weights / rate / workers
            line = {
                "model": name, "threads": workers, "tasks": round(tasks), "seconds_per_task": round(per_task / rate, 1),
                "seconds": round(seconds), "tasks_per_second": round(tasks / seconds, 1),
                "scheduler_share": round(tasks / seconds * OVERHEAD, 3),
                "read_gb_per_second": round(source / seconds / 1e9, 2),
                "write_gb_per_second": round(output / seconds / 1e9, 2),
                "read_back_gb_per_second": round(2 * output / seconds / 1e9, 2),
                "scheduler_mb": round(4 * workers * TASK_BYTES / 1e6, 1),
                "journal_mb": round(tasks * JOURNAL_LINE / 1e6, 2),
                "tail_seconds": round(per_task / rate, 1), "largest_tensor_gb": round(largest * OUTPUT_BPW / 8e9, 2),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", type=float, default=4e8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--types", default="Q4_K,Q6_K,Q3_K,Q8_0,Q4_0")
    parser.add_argument("--plan", action="store_true", help="compute the plan for hundreds of workers instead")
    parser.add_argument("--rate", type=float, default=20e6, help="weights a second and thread, for --plan")
    asked = parser.parse_args()
    if asked.plan:
        plans(asked.rate)
    else:
        bench(asked.weights, asked.repeats, asked.types.split(","))


if __name__ == "__main__":
    main()
