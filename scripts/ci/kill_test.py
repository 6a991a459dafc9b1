"""Kill, cut off and interrupt conversions at random moments, let them go on, and compare every byte of the outcome.

    python scripts/ci/kill_test.py [--kills N] [--crashes N] [--signals N] [--processes SHARE] [--seed S]

SIGKILL at random times and at random calls of the system, several times in a row, with the journal or the unfinished
output damaged at random in between; power cuts, replayed from a log of disk writes (tests/helpers/crashes.py);
SIGINT, SIGTERM and SIGHUP, also inside the slowest encoder on 64 threads. Prints a JSON line for each; the exit code
is 1 if anything differs. Most victims are forks of this process, which has everything imported; a share of them are
processes of their own.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
import crashes
import victims
from conversions import half, small_model
from victims import Case, Child, Process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT = 2.0  # seconds from a signal to the end
_DAMAGES = ("none", "none", "none", "journal cut", "journal bit", "part bit", "part cut")


@dataclass
class Bench:
    """Where and with what chance it is done; share: of the victims that are processes, not forks of this one."""

    work: Path
    rng: random.Random
    share: float
    n_failures: int = 0

    def fail(self, **what):
        """What went wrong, printed as it is found."""
        self.n_failures += 1
        print(json.dumps({"what": "failure", **what}), flush=True)

    def show(self, what, **figures):
        print(json.dumps({"what": what, **figures, "differing": self.n_failures}), flush=True)

    def whole(self):
        """Whether the next victim is a process."""
        return self.rng.random() < self.share


def kill_once(bench, case, folder, calls, tally):
    """Start the command and kill it somewhere; how it ended where it was quicker."""
    rng, whole = bench.rng, bench.whole()
    commit = rng.choice((None, None, 5000, 2**30))
    if not whole and rng.random() < 0.7:
        name = rng.choice([name for name in victims.CALLS if calls.get(name)])
        number = rng.randint(1, calls[name])
        moment = rng.choice(("before", "after", *(["during"] if name == "pwrite" else [])))
        ended = Child(case, folder, lambda: victims.die_at(name, number, moment), commit=commit).wait()
        label = f"{moment} {name}"
    else:
        label = "at a time, process" if whole else "at a time, fork"
        child = (Process if whole else Child)(case, folder, commit=commit)
        time.sleep(rng.uniform(0, (case.process_seconds if whole else case.seconds) * 1.1))
        child.kill()
        ended = child.wait()
    if ended.code == -signal.SIGKILL:
        tally[label] += 1
        return None
    return ended


def damage(folder, rng):
    """Harm what the killed run left, as a bad disk might; what was done."""
    kind = rng.choice(_DAMAGES)
    journals = sorted(folder.glob("*.part.journal"))
    parts = sorted(p for p in folder.glob("*.gguf.part") if not p.with_suffix("").exists())
    path = rng.choice(journals if kind.startswith("journal") else parts) if (journals and parts) else None
    content = bytearray() if path is None else bytearray(path.read_bytes())
    if kind == "none" or len(content) < 100:
        return "none"
    if kind.endswith("cut"):
        tail = rng.choice((10, 300, len(content)))
        os.truncate(path, rng.randint(max(0, len(content) - tail), len(content)))
    else:
        at = rng.randrange(24, len(content))
        content[at] ^= 1 << rng.randrange(8)
        with path.open("r+b") as file:  # in place: the file may have a second name
            file.seek(at)
            file.write(content[at : at + 1])
    return kind


def kills(bench, found, calls, n):
    rng = bench.rng
    moments, damages, runs, n_finished, n_rounds = Counter(), Counter(), Counter(), 0, 0
    while sum(moments.values()) < n:
        case = found[n_rounds % len(found)] if n_rounds % 10 != 9 else rng.choice(found)
        folder = case.prepare(bench.work / f"kill-{n_rounds}")
        n_rounds += 1
        harmed = False
        for _ in range(rng.choice((1, 1, 2, 4))):
            ended = kill_once(bench, case, folder, calls[case.name], moments)
            if ended is not None and ended.code not in (0, 5):
                bench.fail(case=case.name, folder=str(folder), code=ended.code, err=ended.err[-2000:])
            n_finished += ended is not None
            odd = victims.oddities(case, folder)
            if odd is not None:
                bench.fail(case=case.name, folder=str(folder), moments=dict(moments), odd=odd)
            if victims.is_done(case, folder):
                break
            done = damage(folder, rng)
            damages[done] += 1
            harmed = harmed or done != "none"
        outcome = victims.resume(case, folder, whole=bench.whole(), harmed=harmed)
        if isinstance(outcome, str):
            bench.fail(case=case.name, folder=str(folder), harmed=harmed, wrong=outcome)
        else:
            runs[f"{outcome} more runs"] += 1
            shutil.rmtree(folder)
    bench.show(
        "kills",
        kills=sum(moments.values()),
        conversions=n_rounds,
        moments=dict(sorted(moments.items())),
        damaged={k: v for k, v in sorted(damages.items()) if k != "none"},
        finished_before=n_finished,
        resumed=dict(sorted(runs.items())),
    )


def power_cuts(bench, found, n, without):
    """Replay power cuts of whole runs, and of runs that went on after one."""
    work, rng, n_lost, n_ends, n_second = bench.work, bench.rng, 0, Counter(), 0
    for case in found:
        logs = [_logged(case, case.prepare(work / f"log-{case.name}"), without)]
        for i in range(max(1, n // len(found))):
            log = logs[0] if len(logs) == 1 or rng.random() < 0.5 else rng.choice(logs)
            # half of them near a change of names or the end: the moments that are rare
            rare = [j for j, o in enumerate(log.operations) if o[0] not in ("write", "sync")]
            end = rng.choice(rare) + rng.randint(0, 2) if rng.random() < 0.5 else rng.randint(0, len(log.operations))
            end = min(end, len(log.operations))
            state, lost = crashes.crashed(log, end, rng, ordered=rng.random() < 0.5)
            folder = crashes.placed(state, work / f"crash-{case.name}-{i}")
            n_lost += lost
            n_ends["before " + (log.operations[end][0] if end < len(log.operations) else "the end")] += 1
            n_second += log is not logs[0]
            odd = victims.oddities(case, folder)
            if odd is None and len(logs) < 8 and rng.random() < 0.2 and not victims.is_done(case, folder):
                copy = crashes.placed(state, work / f"log-{case.name}-{len(logs)}")
                logs.append(_logged(case, copy, without))
            outcome = odd or victims.resume(case, folder)
            if isinstance(outcome, str):
                trace = [o[:1] + tuple(x for x in o[1:] if not isinstance(x, bytes)) for o in log.operations[:end]]
                bench.fail(case=case.name, end=end, wrong=outcome, state=sorted(state), last=trace[-12:])
            shutil.rmtree(folder)
    bench.show(
        "power cuts",
        cuts=sum(n_ends.values()),
        operations_lost=n_lost,
        moments=dict(sorted(n_ends.items())),
        of_resumed_runs=n_second,
    )


def _logged(case, folder, without):
    path = folder.with_name(f"{folder.name}.pickle")
    Child(case, folder, lambda: crashes.Recorder(folder, path, without).install()).wait()
    return pickle.loads(path.read_bytes())


def signals(bench, found, n):
    for number in SIGNALS:
        times, n_finished, n_whole, runs = [], 0, 0, Counter()
        while len(times) < n:
            case = found[len(times) % len(found)]
            folder = case.prepare(bench.work / f"signal-{number.name}-{len(times)}-{n_finished}")
            whole = bench.whole()
            child, ready = _listening(case, folder, whole)
            time.sleep(bench.rng.uniform(0, case.seconds * (1.5 if whole else 1.0)))
            begun = time.monotonic()
            child.kill(number)
            ended = child.wait()
            seconds = time.monotonic() - begun
            ready.unlink(missing_ok=True)
            # while Python ends, after all is done, signals have their own way again
            if ended.code in (0, -number) and victims.is_done(case, folder):
                n_finished += 1
            else:
                times.append(seconds)
                n_whole += whole
                _judge(bench, case, ended, number, seconds)
            outcome = victims.oddities(case, folder) or victims.resume(case, folder)
            if isinstance(outcome, str):
                bench.fail(case=case.name, signal=number.name, folder=str(folder), wrong=outcome)
            else:
                runs[f"{outcome} more runs"] += 1
                shutil.rmtree(folder)
        bench.show(
            number.name,
            **_spread(times),
            processes=n_whole,
            finished_before=n_finished,
            resumed=dict(sorted(runs.items())),
        )


def _listening(case, folder, whole):
    """The command, once it hears signals."""
    ready = folder.with_name(f"{folder.name}.ready")
    if whole:
        before = (
            "import pathlib; from requant.cli import messages; prepare = messages.prepare\n"
            f"messages.prepare = lambda: (prepare(), pathlib.Path({str(ready)!r}).touch())"
        )
        child = Process(case, folder, before=before)
    else:
        child = Child(case, folder, lambda: _announce(ready))
    while not ready.exists():
        time.sleep(0.005)
    return child, ready


def _announce(ready):
    from requant.cli import messages

    prepare = messages.prepare
    messages.prepare = lambda: (prepare(), ready.touch())


def _judge(bench, case, ended, number, seconds):
    lines = [line for line in ended.err.splitlines() if "error" in line.lower() or "Traceback" in line]
    said = len(lines) == 1 and lines[0].startswith(f"requant: error: stopped by {number.name}; run the same command")
    if ended.code != 128 + number or not said or seconds > LIMIT:
        what = {"code": ended.code, "seconds": seconds, "err": ended.err[-1000:]}
        bench.fail(case=case.name, signal=number.name, **what)


def _spread(times):
    times = sorted(times)
    quantile = times[int(0.95 * (len(times) - 1))]
    figures = {"median": statistics.median(times), "p95": quantile, "max": times[-1]}
    return {"signals": len(times), **{f"seconds_{k}": round(v, 3) for k, v in figures.items()}}


def slowest_kernel(bench, n):
    """Signals while 64 threads encode whole chunks with the slowest encoder that weighs by importance."""
    work = bench.work
    path = small_model(*(half(f"blk.{i}.ffn_up.weight", (4096, 4096), seed=i) for i in range(4))).write(
        work / "large.gguf"
    )
    _write_importance(path, work / "large.imatrix.gguf")
    words = ("--type", "IQ1_M", "--effort", "best", "--threads", "64", "--imatrix", str(work / "large.imatrix.gguf"))
    case = Case("slowest", path, words, sizes=(2**20, 2**26, 2**30))
    times = []
    for i in range(n):
        folder = case.prepare(work / f"slow-{i}")
        child, _ = _listening(case, folder, whole=True)
        while not (folder / "o.gguf.part").exists():
            time.sleep(0.01)
        time.sleep(bench.rng.uniform(0.3, 1.0))
        number, begun = SIGNALS[i % 3], time.monotonic()
        child.kill(number)
        ended = child.wait()
        times.append(time.monotonic() - begun)
        _judge(bench, case, ended, number, times[-1])
    victims.take_reference(case, work / "reference-slow")
    outcome = victims.resume(case, folder)  # the last one; each takes a while
    if isinstance(outcome, str):
        bench.fail(case=case.name, wrong=outcome)
    bench.show("slowest kernel, 64 threads", **_spread(times), resumed=1)


def _write_importance(model, path):
    import numpy as np
    from gguf_files import File, Tensor, pair

    rng = np.random.default_rng(1)
    tensors = []
    for i in range(4):
        sums = (rng.random(4096) + 0.1).astype("<f4").tobytes()
        tensors.append(Tensor(f"blk.{i}.ffn_up.weight.in_sum2", (4096, 1), 0, data=sums))
        tensors.append(Tensor(f"blk.{i}.ffn_up.weight.counts", (1, 1), 0, data=np.ones(1, "<f4").tobytes()))
    pairs = (
        pair("general.type", 8, "imatrix"),
        pair("imatrix.datasets", 9, (8, ["made up"])),
        pair("imatrix.chunk_count", 4, 1),
        pair("imatrix.chunk_size", 4, 512),
    )
    File(pairs, tuple(tensors)).write(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--crashes", type=int, default=400)
    parser.add_argument("--signals", type=int, default=50, help="of each of the three")
    parser.add_argument("--slowest", type=int, default=12, help="signals inside the slowest kernel")
    parser.add_argument("--processes", type=float, default=0.2, help="share of the victims that are no forks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", nargs="*", default=[], help="calls that power cuts take for forgotten: must fail")
    parser.add_argument("--quick", action="store_true", help="leave out the case that runs the model")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-test-") as folder:
        work = Path(folder)
        bench = Bench(work, random.Random(given.seed), given.processes)
        found = victims.cases(work / "models", calibrated=not given.quick)
        victims.warm()
        before = {case.source: case.source.read_bytes() for case in found}
        calls = {case.name: victims.take_reference(case, work / f"reference-{case.name}") for case in found}
        begun = time.monotonic()
        victims.Process(found[0], found[0].prepare(work / "process")).wait()
        for case in found:
            case.process_seconds = case.seconds + time.monotonic() - begun - found[0].seconds
        begun = time.monotonic()
        if given.kills:
            kills(bench, found, calls, given.kills)
        if given.crashes:
            power_cuts(bench, found, given.crashes, given.without)
        if given.signals:
            signals(bench, found, given.signals)
        if given.slowest:
            slowest_kernel(bench, given.slowest)
        if any(path.read_bytes() != content for path, content in before.items()):
            bench.fail(wrong="a source was changed")
        bench.show("kill test", seed=given.seed, minutes=round((time.monotonic() - begun) / 60, 1))
    sys.exit(bool(bench.n_failures))


if __name__ == "__main__":
    main()
