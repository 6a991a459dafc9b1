"""Time and memory of compensated encoding, as Markdown tables for docs/compensation.md.

    taskset -c 0 python scripts/bench/bench_compensation.py kernels [--columns 256 1024 4096] [--types Q4_K]
    python scripts/bench/bench_compensation.py layer [--windows 2] [--window 512] [--type q4_k] [--max-memory 4GiB]
    python scripts/bench/bench_compensation.py cost

`kernels` has the CPU seconds that a million weights take on one thread: of `codec.quantize` and of `encode_compensated`
without and with the search after the feedback, the fastest of interleaved runs. `layer` converts a random model of one
layer of an 8B's width in a process of its own, with the CPU time of each part, the peak of its own memory (RssAnon)
during each, and the peak of the process. What follows for whole models is arithmetic: each part by its operations.
`cost` has the CPU time on the tiny model beside that of scoring on the same tokens.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

import numpy as np

from requant.formats import by_name, codec
from requant.formats.feedback import encode_compensated

TYPES = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_S"),
    *("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "NVFP4", "MXFP4", "Q2_0"),
)
WEIGHTS = 2**16  # of the kernels' matrices
HEAD = 128
SEARCH = 450  # products in the time that the scales of a weight take, by the table of `kernels`
PARTS = ("weighing", "streams", "moments", "ridges", "factors", "encoding", "check", "the rest")


def feedback_of(n):
    """Return a factor, its importance and the moments of `n` columns that are correlated as activations are."""
    from requant.conversion.compensation.targets import find_feedback

    rng = np.random.default_rng(n)
    x = rng.standard_normal((2 * n, n), np.float32) * np.exp(rng.standard_normal(n)).astype(np.float32)
    x += x[:, :1] * rng.standard_normal(n).astype(np.float32)
    h = x.T @ x / np.float32(len(x))
    return find_feedback(h), h


def kernels(options):
    columns = options.columns
    heads = [f"{how}, {n}" for n in columns for how in ("plain", "fast", "best")]
    print(f"| type | {' | '.join(heads)} |")
    print(f"|---{'|--:' * len(heads)}|")
    feedbacks = {n: feedback_of(n) for n in columns}
    for name in options.types:
        fmt, cells = by_name(name), []
        for n in columns:
            x = np.random.default_rng(0).standard_normal((max(64, WEIGHTS // n), n), np.float32)
            found, h = feedbacks[n]
            calls = {
                "plain": lambda x=x, fmt=fmt, found=found: codec.quantize(x, fmt, found.importance),
                "fast": lambda x=x, fmt=fmt, found=found: encode_compensated(fmt, x, found.factor, found.importance),
                "best": lambda x=x, fmt=fmt, found=found, h=h: encode_compensated(
                    fmt, x, found.factor, found.importance, polish=h
                ),
            }
            cells += [f"{seconds / x.size * 1e6:.3f}" for seconds in fastest(calls, options.repeats).values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def fastest(calls, repeats):
    """Return the CPU seconds of the fastest of interleaved runs of each call, behind one that compiles."""
    best = dict.fromkeys(calls, np.inf)
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if repeat:
                best[name] = min(best[name], time.thread_time() - start)
    return best


def write_model(path, n_embd, n_ff):
    """Write a random model of one layer, in F16; an 8B has n_embd 4096 and n_ff 14336."""
    from model.forward import architectures as made

    made.WIDTH, heads = n_embd, n_embd // HEAD
    made.Model.norms.__kwdefaults__["n"] = n_embd
    keys = {"embedding_length": n_embd, "feed_forward_length": n_ff, "attention__head_count": heads}
    keys |= {"attention__head_count_kv": heads // 4, "attention__key_length": HEAD, "attention__value_length": HEAD}

    @made.model("llama", n_layers=1, rope__dimension_count=HEAD, **keys)
    def layer(model, il):
        model.norms("attn_norm", "ffn_norm")
        model.attention(heads=heads, kv=heads // 4, size=HEAD)
        model.dense(n_ff)

    found = made.MAKERS["llama"](1)
    found.tensors = [to_half(t) if len(t.shape) > 1 else t for t in found.tensors]
    found.write(path)


def to_half(tensor):
    return replace(tensor, type_id=1, data=np.frombuffer(tensor.data, "<f4").astype("<f2").tobytes())


class Clock:
    """The CPU seconds of each part of a process, those of parts within it left out, and its peak memory in each."""

    def __init__(self):
        self.seconds, self.peaks = defaultdict(float), defaultdict(int)
        self.stack, self.since = ["the rest"], time.process_time()
        threading.Thread(target=self._watch, daemon=True).start()

    def _charge(self):
        now = time.process_time()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def _watch(self):
        while True:
            status = Path("/proc/self/status").read_text()
            kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
            part = self.stack[-1]
            self.peaks[part] = max(self.peaks[part], kib * 1024)
            time.sleep(0.01)

    @contextlib.contextmanager
    def part(self, name):
        self._charge()
        self.stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self.stack.pop()

    def wrap(self, owner, function, name):
        """Count the calls of a function, which the main thread makes, as a part."""
        own = getattr(owner, function)

        def timed(*args, **how):
            with self.part(name):
                return own(*args, **how)

        setattr(owner, function, timed)


def run(options):
    """Convert as the command does, and print the figures of each part as JSON; of the process of its own."""
    from requant.cli.main import main as command
    from requant.conversion.compensation import encoding, measuring, moments, token_weights, walk

    clock = Clock()
    clock.wrap(token_weights, "weigh_tokens", "weighing")
    clock.wrap(walk, "for_each", "streams")
    clock.wrap(walk, "find_stages", "streams")
    clock.wrap(measuring, "_sum_halves", "streams")
    clock.wrap(moments.Moments, "add", "moments")
    for function in ("add_squares", "mirror"):
        clock.wrap(measuring, function, "moments")
    clock.wrap(measuring, "choose_ridges", "ridges")
    clock.wrap(measuring, "find_feedback", "factors")
    clock.wrap(encoding, "run_alone", "factors")
    clock.wrap(encoding.TensorEncoder, "_encode_rows", "encoding")
    clock.wrap(encoding.TensorEncoder, "encode", "check")
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        command(options.words)
    with clock.part("the rest"):
        print(json.dumps({name: (clock.seconds[name], clock.peaks[name]) for name in PARTS}))


def convert_layer(options, folder):
    """Return the figures of each part of a conversion of one layer, and the peak bytes of the process."""
    path, ids = folder / "model.gguf", folder / "ids.txt"
    subprocess.run([sys.executable, __file__, "write", path, str(options.n_embd), str(options.n_ff)], check=True)
    tokens = np.random.default_rng(0).integers(0, 256, 4 * options.windows * options.window)
    ids.write_text(" ".join(map(str, tokens)))
    words = [path, folder / "out.gguf", "--type", options.type, "--tensor-type", "ffn_down=q6_k", "--tokens", ids]
    words += ["--compensate", options.how, "--windows", options.windows, "--window", options.window, "--threads", "2"]
    words += [] if options.max_memory is None else ["--max-memory", options.max_memory]
    command = [sys.executable, __file__, "run", "convert", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not output:
        sys.exit(f"the conversion: exit code {process.returncode}")
    return json.loads(output), used.ru_maxrss * 1024


def layer(options):
    with tempfile.TemporaryDirectory() as folder:
        parts, peak = convert_layer(options, Path(folder))
    print("| part | CPU s | peak memory |")
    print("|---|--:|--:|")
    for name, (seconds, memory) in parts.items():
        print(f"| {name} | {seconds:.1f} | {memory / 2**20:.0f} MiB |")
    print(f"| all | {sum(seconds for seconds, _ in parts.values()):.1f} | {peak / 2**20:.0f} MiB |")
    n_tokens = 4 * options.windows * options.window
    measured = count_operations(dense(options.n_embd, options.n_ff), n_tokens)
    print("\n| part | one layer measured, CPU s | 32 layers of an 8B, h | 48 layers of a 30B-A3B, h |")
    print("|---|--:|--:|--:|")
    totals, models = np.zeros(2), ((32, dense(4096, 14336)), (48, EXPERTS))
    for name, done in measured.items():
        seconds = parts[name][0]
        own = [n * count_operations(stages, options.tokens)[name] / done * seconds / 3600 for n, stages in models]
        totals += own
        print(f"| {name} | {seconds:.1f} | {own[0]:.2f} | {own[1]:.2f} |")
    print(f"| all | | {totals[0]:.2f} | {totals[1]:.2f} |")


def dense(n, n_ff):
    """Return the stages of a layer: columns, rows of all matrices, rows that write to the stream, experts and used."""
    return ((n, n * 3 // 2, 0, 1, 1), (n, n, n, 1, 1), (n, 2 * n_ff, 0, 1, 1), (n_ff, n, n, 1, 1))


# of a 30B-A3B: n_embd 2048, 32 heads of 128 with 4 of keys and values, 128 experts of 768, of which a token passes 8
EXPERTS = ((2048, 5120, 0, 1, 1), (4096, 2048, 2048, 1, 1), (2048, 1536, 0, 128, 8), (768, 2048, 0, 128, 8))


def count_operations(stages, n_tokens):
    """Return the multiplications of each part for one layer, as far as parts are in proportion to them."""
    active = sum(n * rows * used for n, rows, _, _, used in stages)
    found = dict.fromkeys(("weighing", "streams", "moments", "ridges", "factors", "encoding", "check"), 0.0)
    found["weighing"] = 3 * active * n_tokens  # forward, and back to the inputs through a forward of its own
    for i, (n, rows, written, experts, used) in enumerate(stages):
        before = sum(stage[0] * stage[1] * stage[4] for stage in stages[:i])
        found["streams"] += 2 * n_tokens * (active if experts > 1 else before)  # experts are run to the end
        targets = experts == 1
        found["moments"] += n_tokens * n * (n / 2 * used * (2 if experts > 1 else 1) + (n + written) * targets)
        ridges = 8 if n <= 4096 else 3
        found["ridges"] += targets * 2 * ridges * (n**3 / 6 + 3 * 192 * n**2)
        found["factors"] += experts * (n**3 / 3 + targets * n**3 / 6)
        found["encoding"] += experts * rows * n * (SEARCH + n / 2 + 2 * n * targets)
        found["check"] += n_tokens / 8 * used * rows * n * 4
    found["streams"] += 2 * n_tokens * active
    return found


def cost(options):
    """Scoring the tiny model, and what compensation takes beside it on the same tokens."""
    from conversions import convert
    from real_models import TINY

    from requant.container.source import open_source
    from requant.conversion.compensation.token_weights import weigh_tokens
    from requant.conversion.compensation.walk import CompensationText
    from requant.formats.feedback import warm_up
    from requant.model.forward.passes import read_model
    from requant.model.forward.weights import Weights
    from requant.planning.constraints import Constraints, size_limit
    from requant.planning.engines import engine_named
    from requant.planning.solver.solve import solve
    from requant.scoring.calibration_data import WindowSpec, shipped_windows
    from requant.scoring.fisher import score_by_gradients
    from requant.scoring.options import ScoringOptions

    types, spent = engine_named("llama.cpp").candidates, [0.0]
    codec.warm_up(by_name(name) for name in types)
    warm_up([by_name(name) for name in types], search=True)

    def since():
        before, spent[0] = spent[0], time.process_time()
        return spent[0] - before

    with tempfile.TemporaryDirectory() as folder, open_source(TINY) as source:
        text = shipped_windows(source, WindowSpec(n=options.windows))
        since()
        losses = score_by_gradients(source, text, ScoringOptions(types)).losses
        scoring = since()
        plan, model = solve(losses, Constraints((size_limit(options.size, 0),))), read_model(Weights(source))
        since()
        weights = weigh_tokens(model, text.windows)
        weighing = since()
        print(f"scoring {scoring:.1f} CPU s, weighing tokens {weighing:.1f}")
        for how in ("fast", "best"):
            given = CompensationText(text.name, model, text.windows, weights, best=how == "best")
            since()
            convert(source, replace(plan, compensation=how), Path(folder) / how, compensation=given)
            walk = since()
            print(f"{how} {walk:.1f} CPU s; with weighing {(weighing + walk) / scoring:.2f} times scoring")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    own = commands.add_parser("kernels")
    own.add_argument("--columns", type=int, nargs="+", default=[256, 1024, 4096])
    own.add_argument("--types", nargs="+", default=TYPES)
    own.add_argument("--repeats", type=int, default=3)
    own.set_defaults(work=kernels)
    own = commands.add_parser("layer")
    own.add_argument("--n-embd", type=int, default=4096)
    own.add_argument("--n-ff", type=int, default=14336)
    own.add_argument("--tokens", type=int, default=16384, help="of the whole models")
    own.add_argument("--windows", type=int, default=2)
    own.add_argument("--window", type=int, default=512)
    own.add_argument("--type", default="q4_k")
    own.add_argument("--how", default="fast")
    own.add_argument("--max-memory")
    own.set_defaults(work=layer)
    own = commands.add_parser("cost")
    own.add_argument("--windows", type=int, default=32)
    own.add_argument("--size", type=int, default=5111296)
    own.set_defaults(work=cost)
    own = commands.add_parser("write")  # in a process of its own, as that of `run` is
    own.add_argument("path", type=Path)
    own.add_argument("n", type=int, nargs=2)
    own.set_defaults(work=lambda options: write_model(options.path, *options.n))
    own = commands.add_parser("run")
    own.add_argument("words", nargs=argparse.REMAINDER)
    own.set_defaults(work=run)
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
