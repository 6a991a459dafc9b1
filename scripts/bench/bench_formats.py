"""Encoders and decoders against ggml's own, on real weights: error and speed on one thread, a JSON line for each.

    python scripts/bench/bench_formats.py [--types Q4_K,Q6_K] [--effort default] [--repeats 5] [--markdown]

rmse_ratio is ours over ggml's (below 1 is better), weighted by the importance where there is one; speed_ratio is ggml's
time over ours, the minimum of interleaved runs, and decode_ratio the same for reading. Weights of models that come
quantized are dithered by one step of their grid, so that the old grid helps nobody. The fixture's importance is a real
imatrix; that of the other models is drawn from a gamma distribution.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
import ggml
import real_models

from requant.container.imatrix import importance_for, read_imatrix
from requant.container.source import open_source
from requant.formats import FORMATS, BlockFormat, Effort, codec

LIMIT = 2**21  # weights per tensor


def dithered(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform noise of one grid step, read off each group of 16 as the smallest difference between two values."""
    groups = x.reshape(-1, 16)
    gaps = np.diff(np.sort(groups, axis=1), axis=1)
    gaps[gaps <= 1e-4 * np.abs(groups).max(axis=1, keepdims=True)] = np.inf
    step = gaps.min(axis=1, keepdims=True)
    step[~np.isfinite(step)] = 0
    noise = rng.random(groups.shape, dtype=np.float32) - np.float32(0.5)
    return (groups + noise * step).reshape(x.shape).astype(np.float32)


def data() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Model, weights (n_rows, n_per_row) with rows of whole super-blocks, importance (n_per_row,)."""
    rng = np.random.default_rng(1)
    imatrix = read_imatrix(real_models.IMATRIX)
    for model, path, names in (
        ("tiny-llama", real_models.TINY, ("blk.3.ffn_up.weight", "blk.5.ffn_down.weight")),
        ("SmolLM2-135M", real_models.smollm2(), ("blk.3.ffn_down.weight", "blk.20.ffn_down.weight")),
        ("Gemma-3-270M", real_models.gemma3(), ("blk.2.attn_output.weight", "blk.9.ffn_down.weight")),
    ):
        with open_source(path) as source:
            for name in names:
                tensor = source.tensor(name)
                rows = min(tensor.n_rows, LIMIT // tensor.n_per_row)
                x = codec.dequantize(source.read_rows(tensor, 0, rows), tensor.format)
                measured = importance_for(imatrix, name, tensor.shape) if path == real_models.TINY else None
                drawn = (rng.gamma(0.5, 1, tensor.n_per_row) + 1e-3).astype(np.float32)
                quantized = tensor.format.block_weights > 1
                yield model, dithered(x, rng) if quantized else x, drawn if measured is None else measured[0]


def fastest(calls: dict, repeats: int) -> dict[str, float]:
    """Seconds of the fastest of interleaved runs of each call."""
    best = dict.fromkeys(calls, np.inf)
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def error(x: np.ndarray, encoded: np.ndarray, fmt: BlockFormat, w: np.ndarray | None) -> float:
    return float(codec.row_errors(x, codec.dequantize(encoded, fmt), w)[:, 3].sum())


def encoding(fmt: BlockFormat, x: np.ndarray, w: np.ndarray | None, effort: Effort, repeats: int) -> dict:
    """Both encoders on `x`."""
    ours = codec.quantize(x, fmt, w, effort)
    peer = np.frombuffer(ggml.quantize_chunk(fmt.type_id, x, w), np.uint8).reshape(len(x), -1)
    calls = {
        "ours": lambda: codec.quantize(x, fmt, w, effort),
        "ggml": lambda: ggml.quantize_chunk(fmt.type_id, x, w),
    }
    seconds = fastest(calls, repeats)
    return {
        "rmse_ratio": round(float(np.sqrt(error(x, ours, fmt, w) / error(x, peer, fmt, w))), 4),
        "speed_ratio": round(seconds["ggml"] / seconds["ours"], 2),
        "ours_mweights_s": round(x.size / seconds["ours"] / 1e6, 1),
        "ggml_mweights_s": round(x.size / seconds["ggml"] / 1e6, 1),
    }


def decoding(fmt: BlockFormat, x: np.ndarray, repeats: int) -> float:
    """ggml's time over ours to decode `x`, into memory that was touched before."""
    data = codec.quantize(x, fmt, None, Effort.FAST)
    blocks = data.reshape(-1).view(fmt.kernels.LAYOUT)
    out = np.zeros((blocks.size, fmt.block_weights), np.float32)
    calls = {
        "ours": lambda: fmt.kernels.decode(blocks, out),
        "ggml": lambda: ggml.decode_into(fmt.type_id, data, out),
    }
    seconds = fastest(calls, 4 * repeats)
    return round(seconds["ggml"] / seconds["ours"], 2)


def measure(wanted: list[BlockFormat], effort: Effort, repeats: int) -> Iterator[dict]:
    """A line per type, without and with importance, and tensor."""
    tensors = list(data())
    for fmt in wanted:
        codec.warm_up([fmt])
        for weighted in (False, True):
            for model, x, importance in tensors:
                row = {"type": fmt.name, "model": model, "importance": weighted, "effort": effort.name.lower()}
                row |= encoding(fmt, x, importance if weighted else None, effort, repeats)
                yield row if weighted else row | {"decode_ratio": decoding(fmt, x, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(f.name for f in FORMATS.values() if f.can_encode))
    parser.add_argument("--effort", default="default", choices=[e.name.lower() for e in Effort])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/benchmarks.md instead")
    args = parser.parse_args()
    wanted = [f for f in FORMATS.values() if f.name in args.types.upper().split(",") and f.block_weights > 1]
    rows = []
    for row in measure(wanted, Effort[args.effort.upper()], args.repeats):
        rows.append(row)
        if not args.markdown:
            print(json.dumps(row), flush=True)
    if args.markdown:
        print_table(rows)


def print_table(rows: list[dict]) -> None:
    """A line per type: worst error ratio and median speed ratio, without and with importance, and of decoding."""
    print("| type | error ÷ ggml's, worst | speed × ggml's, median | the same with importance | | decoding × ggml's |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in dict.fromkeys(r["type"] for r in rows):
        cells = []
        for weighted in (False, True):
            mine = [r for r in rows if r["type"] == name and r["importance"] == weighted]
            cells += [f"{max(r['rmse_ratio'] for r in mine):.3f}"]
            cells += [f"{np.median([r['speed_ratio'] for r in mine]):.1f}"]
        cells += [f"{np.median([r['decode_ratio'] for r in rows if r['type'] == name and 'decode_ratio' in r]):.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
