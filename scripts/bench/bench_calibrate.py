"""What calibrating, scoring and evaluating take: seconds and peak memory of whole processes, a JSON line each.

    python scripts/bench/bench_calibrate.py [--windows 32]

SmolLM2-135M dithered to F16: `calibrate` with gradients over windows of 512 tokens of eval.txt and calibration.txt
together, `score` with gradients (8 windows, the default types), `evaluate` of a Q4_0 copy against it at 16k tokens;
calibrate's memory for the tiny model and for one of four times its layers; then the arithmetic for larger models.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests" / "helpers")]
import real_models
from bench_quality import in_f16

from requant.container.layout import lay_out
from requant.container.part import PartFile
from requant.container.source import open_source

TEXTS = [real_models.FIXTURES / f"{name}.txt" for name in ("calibration", "eval")]


def run(what: str, *words: object) -> dict:
    """A requant command in a process of its own."""
    begun = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-m", "requant", *map(str, words)])
    _, status, used = os.wait4(pid, 0)
    assert status == 0, words
    seconds = time.perf_counter() - begun
    return {"what": what, "seconds": round(seconds, 1), "peak_mib": used.ru_maxrss // 1024}


def deeper(source_path: Path, times: int, out: Path) -> Path:
    """The model with every layer `times` times, as a file."""
    with open_source(source_path) as source:
        n = source.metadata.get_int("llama.block_count")
        copies = [(t.name, t) for t in source.tensors if not t.name.startswith("blk.")]
        for copy in range(times):
            for tensor in source.tensors:
                if tensor.name.startswith("blk."):
                    _, layer, rest = tensor.name.split(".", 2)
                    copies.append((f"blk.{int(layer) + copy * n}.{rest}", tensor))
        metadata = source.metadata.with_values({"llama.block_count": ("u32", n * times)})
        layout = lay_out(metadata, [(name, t.shape, t.type_id) for name, t in copies], source_path)
        with PartFile(out, layout.size, force=True) as output:
            for placed, (_, tensor) in zip(layout.tensors, copies, strict=True):
                output.write_at(placed.offset, source.read_rows(tensor))
            output.publish(layout.header)
    return out


def extrapolation(name: str, rate: float, *, n_layers: int, n_embd: int, n_ff: int, n_kv: int, n_vocab: int) -> dict:
    """Seconds and bytes of a gradient score over 8 windows of 512 tokens at `rate` floating-point operations a second.

    Per weight and token: 2 forward, 2 forward again, 2 for the gradient at the input, 2 for F; the output matrix once.
    Memory: the largest layer as float32, its inputs and gradients at every token, the stream and its gradient.
    """
    layer = 2 * n_embd * (n_embd + n_kv) + 3 * n_embd * n_ff
    tokens, output = 8 * 512, n_vocab * n_embd
    operations = 8 * tokens * (layer * n_layers + output)
    seen = 4 * tokens * (3 * n_embd + n_ff + 2 * n_embd + 2 * n_kv + 2 * n_ff + n_embd)
    memory = 4 * max(layer, output) + seen + 3 * 4 * tokens * n_embd
    kept = 4 * tokens * n_embd * n_layers
    return {
        "model": name,
        "tera_operations": round(operations / 1e12),
        "minutes": round(operations / rate / 60),
        "memory_gib": round(memory / 2**30, 1),
        "temporary_file_gib": round(kept / 2**30, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, smol = Path(folder) / "text.txt", in_f16(real_models.smollm2(), Path(folder) / "smol.gguf")
        text.write_text("\n".join(path.read_text() for path in TEXTS))
        out, copy = Path(folder) / "out", Path(folder) / "q4.gguf"
        more = ["--text", text, "--windows", args.windows]
        print(json.dumps(run("calibrate SmolLM2", "calibrate", smol, "-o", out, "--force", *more)), flush=True)
        scored = run("score SmolLM2", "score", smol, "-o", out, "--force")
        print(json.dumps(scored), flush=True)
        run("", "convert", smol, copy, "--type", "Q4_0", "--no-verify")
        evaluated = run("evaluate SmolLM2", "evaluate", copy, "--base", smol, *more)
        print(json.dumps(evaluated), flush=True)
        for times in (1, 4):
            path = deeper(real_models.TINY, times, Path(folder) / "deep.gguf")
            what = f"calibrate tiny, {10 * times} layers"
            print(json.dumps(run(what, "calibrate", path, "-o", out, "--force", *more)), flush=True)
        with open_source(smol) as source:
            weights = sum(t.n_weights for t in source.tensors)
    rate = 8 * 8 * 512 * weights / scored["seconds"]
    print(json.dumps({"operations_per_second": f"{rate:.3g}", "of": "the score of SmolLM2"}))
    common = {"n_kv": 1024, "n_vocab": 128256}
    print(json.dumps(extrapolation("Llama 3.1 8B", rate, n_layers=32, n_embd=4096, n_ff=14336, **common)))
    print(json.dumps(extrapolation("Llama 3.1 70B", rate, n_layers=80, n_embd=8192, n_ff=28672, **common)))


if __name__ == "__main__":
    main()
