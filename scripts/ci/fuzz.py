"""Check mutants of every kind of file that requant reads; JSON lines of how many of each kind came to what.

    python scripts/ci/fuzz.py --mutants 10000000 [--seed S] [--jobs N] [--kind K] [--keep FOLDER]
    python scripts/ci/fuzz.py --show model-1-451            # a mutant that failed, once more, with its traceback
    python scripts/ci/fuzz.py --atheris plan [libFuzzer's]  # guided by coverage, until stopped; needs requant[fuzz]

A mutant that fails is written into FOLDER as KIND-SEED-NUMBER.FILE, and the exit code is 1. Control-C ends a run early.
"""

import argparse
import json
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
BATCH, ADDRESS_SPACE = 5000, 6 * 2**30  # mutants; bytes that a process may map


def _batch(job):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to hear
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    from fuzz.run import run

    return job[0], run(*job[:3], job[3], compare=job[4])


def long_run(args: argparse.Namespace) -> int:
    from fuzz.run import KINDS, Outcome, numbers

    start, total = time.perf_counter(), {kind: Outcome() for kind in args.kind or KINDS}
    jobs = []
    for kind in total:
        n = args.mutants if args.kind else numbers(kind, args.mutants)
        jobs += [(kind, args.seed, range(i, min(i + BATCH, n)), args.keep, args.compare) for i in range(0, n, BATCH)]
    jobs.sort(key=lambda job: job[2].start)  # the kinds in turn, so that a run that is stopped saw all of them
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, suppress(KeyboardInterrupt):
        for kind, outcome in pool.imap_unordered(_batch, jobs):
            total[kind].add(outcome)
            for failure in outcome.failures:
                print(json.dumps({"failure": failure}), flush=True)
    for kind, outcome in total.items():
        print(json.dumps(_figures(kind, outcome)))
    n, seconds = sum(o.verdicts.total() for o in total.values()), time.perf_counter() - start
    failures = sum(len(o.failures) for o in total.values())
    done = {"mutants": n, "failures": failures, "seed": args.seed, "per_second": round(n / seconds)}
    print(json.dumps(done), flush=True)
    return int(failures > 0)


def _figures(kind, outcome):
    verdicts = {verdict: n for (_, verdict), n in sorted(outcome.verdicts.items())}
    figures = {"compared_with_ggml": outcome.compared, "slowest_s": round(outcome.slowest, 4)}
    return {"kind": kind} | verdicts | figures | {"most_mib": round(outcome.most_memory / 2**20, 2)}


def show(name: str) -> int:
    import warnings

    from fuzz.run import KINDS, Place, mutant

    kind, seed, index = name.split("-")
    warnings.simplefilter("error")
    with Place() as place:
        print(KINDS[kind][0](place.put(mutant(kind, int(seed), int(index))), 2))
    return 0


def guided(kind: str, options: list[str]) -> None:
    """libFuzzer with coverage of requant; half of the inputs are mutants of ours."""
    import atheris

    with atheris.instrument_imports(include=["requant"]):
        from fuzz.run import KINDS, Place, mutant

    def one(content: bytes) -> None:
        KINDS[kind][0](place.put({"file": content}), 1)

    def changed(content: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return next(iter(mutant(kind, 0, seed).values()))[:most]
        return atheris.Mutate(content, most)

    with Place() as place, tempfile.TemporaryDirectory() as folder:
        for index in range(200):
            (Path(folder) / str(index)).write_bytes(next(iter(mutant(kind, 0, index).values())))
        atheris.Setup([sys.argv[0], folder, "-max_len=32768", *options], one, custom_mutator=changed)
        atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--kind", action="append", help="only this kind; all --mutants are of it")
    parser.add_argument("--keep", type=Path, default=Path("mutants"), help="where mutants that fail are written")
    parser.add_argument("--compare", type=int, default=4, help="give ggml one of so many that are taken")
    parser.add_argument("--show", metavar="NAME")
    parser.add_argument("--atheris", metavar="KIND")
    args, options = parser.parse_known_args()
    if args.show:
        return show(args.show)
    if args.atheris:
        guided(args.atheris, options)
    if options:
        parser.error(f"unknown: {' '.join(options)}")
    args.keep.mkdir(parents=True, exist_ok=True)
    return long_run(args)


if __name__ == "__main__":
    sys.exit(main())
