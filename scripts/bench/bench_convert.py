"""Seconds, peak memory and reproducibility of convert, and the same work by ggml's encoders; JSON lines.

    python scripts/bench/bench_convert.py [MODEL.gguf] [--weights 1e9] [--repeats 3] [--types Q4_K,Q6_K]

Every run is a process of its own, so that its peak (ru_maxrss of the children) is its own too; it loads its kernels
from the cache before its clock starts, and they are compiled beforehand. One and two threads alternate, and the
speedup is the ratio of the medians. `peak_mib` is the highest of all runs so far. The peer encodes the same chunks of
the same tensors with ggml_quantize_chunk on as many threads and writes them; it checks, measures and hashes nothing.
The synthetic model is llama-shaped F16 of normally distributed weights, made in a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
import ggml

from requant.common.threads import in_order
from requant.container.layout import lay_out
from requant.container.metadata import Metadata
from requant.container.source import Source, open_source, require_model
from requant.conversion.chunks import Chunk, TensorJob, split_into_chunks
from requant.conversion.convert import convert
from requant.conversion.options import ConversionOptions
from requant.conversion.prepare import formats_used
from requant.formats import Effort, by_name, codec
from requant.formats.codec import CHUNK_WEIGHTS
from requant.model.roles import layer_of, never_quantize, role_of
from requant.planning.output_layout import output_layouts
from requant.planning.plan import Choice, Plan

WIDTH, FEED_FORWARD, VOCABULARY = 2048, 8192, 32768


def shapes(n_weights: float) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a dense model of about `n_weights` weights."""
    matrices = {
        **dict.fromkeys(("attn_q", "attn_output"), (WIDTH, WIDTH)),
        **dict.fromkeys(("attn_k", "attn_v"), (WIDTH, WIDTH // 4)),
        **dict.fromkeys(("ffn_gate", "ffn_up"), (WIDTH, FEED_FORWARD)),
        "ffn_down": (FEED_FORWARD, WIDTH),
    }
    per_layer = sum(math.prod(shape) for shape in matrices.values())
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (WIDTH, VOCABULARY))]
    for layer in range(max(1, round((n_weights - WIDTH * VOCABULARY) / per_layer))):
        found.append((f"blk.{layer}.attn_norm.weight", (WIDTH,)))
        found += [(f"blk.{layer}.{name}.weight", shape) for name, shape in matrices.items()]
    return found


def synthesize(path: Path, n_weights: float) -> None:
    tensors = [(name, shape, 0 if len(shape) == 1 else 1) for name, shape in shapes(n_weights)]
    metadata = Metadata(str(path), {}).with_values({"general.architecture": ("str", "llama")})
    layout = lay_out(metadata, tensors, path)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(layout.header)
        for placed in layout.tensors:
            file.seek(placed.offset)
            for first in range(0, math.prod(placed.shape), CHUNK_WEIGHTS):
                n = min(CHUNK_WEIGHTS, math.prod(placed.shape) - first)
                values = rng.standard_normal(n, np.float32) * np.float32(0.02)
                file.write(values.astype("<f2" if placed.type_id else "<f4").tobytes())
        file.truncate(layout.size)


def plan_for(source: Source, types: list[str]) -> Plan:
    """The types in turn for what may be quantized, the rest copied."""
    arch, choices = require_model(source), []
    for i, t in enumerate(source.tensors):
        usable = [types[(i + k) % len(types)] for k in range(len(types))]
        usable = [name for name in usable if by_name(name).divides(t.n_per_row)]
        free = usable and never_quantize(arch, t.name, t.shape, t.type_id) is None
        name = usable[0] if free else t.format.name
        size = by_name(name).n_bytes(t.n_weights)
        place = t.name, role_of(t.name), layer_of(t.name), t.shape
        choices.append(Choice(*place, t.format.name, name, size, 0.0, 0.0, device="gpu"))
    return Plan(source.name, source.header_sha256, arch, "dfix", {}, (), {}, tuple(choices), None, None)


def once(model: Path, out: Path, types: list[str], threads: int, *, peer: bool) -> None:
    """One conversion in this process: its seconds, without imports and kernels."""
    with open_source(model) as source:
        plan = plan_for(source, types)
        codec.warm_up(formats_used(plan))
        start = time.perf_counter()
        if peer:
            convert_by_ggml(source, plan, out, threads)
        else:
            convert(source, plan, out, options=ConversionOptions(threads=threads, force=True))
        print(json.dumps({"seconds": time.perf_counter() - start}))


def convert_by_ggml(source: Source, plan: Plan, out: Path, threads: int) -> None:
    """The plan carried out with ggml's decoders and encoders."""
    (layout,) = output_layouts(source, plan)
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.pwrite(descriptor, layout.header, 0)

    def write(chunk: Chunk) -> None:
        job = chunk.job
        data = source.read_rows(job.tensor, chunk.first_row, chunk.n_rows)
        if not job.choice.copied:
            x = ggml.decode(job.tensor.type_id, data).reshape(chunk.n_rows, -1)
            data = ggml.quantize_chunk(job.format.type_id, x)
        os.pwrite(descriptor, data, job.offset + chunk.first_row * job.format.n_bytes(job.tensor.n_per_row))

    jobs = [
        TensorJob(tensor, choice, by_name(choice.type), 0, placed.offset, None, Effort.DEFAULT)
        for tensor, choice, placed in zip(source.tensors, plan.choices, layout.tensors, strict=True)
    ]
    for _ in in_order(write, (chunk for job in jobs for chunk in split_into_chunks(job)), threads):
        pass
    os.close(descriptor)


def child(model: Path, out: Path, types: list[str], threads: int, *, peer: bool = False) -> tuple[float, float]:
    """Seconds and peak MiB of a conversion in a process of its own, the highest of all so far."""
    command = [sys.executable, __file__, str(model), "--once", str(out), str(threads), "--types", ",".join(types)]
    command += ["--ggml"] if peer else []
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return json.loads(ran.stdout)["seconds"], peak


def bench(model: Path, folder: Path, types: list[str], repeats: int) -> None:
    out = folder / "out.gguf"
    with open_source(model) as source:
        n_weights = sum(t.n_weights for t in source.tensors)
        codec.warm_up(formats_used(plan_for(source, types)))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    hashes = {}
    peak = 0.0
    for threads in [1, 2] * repeats + [7]:
        taken, peak = child(model, out, types, threads)
        if threads in seconds:
            seconds[threads].append(taken)
        hashes[threads] = digest(out)
    size = out.stat().st_size
    one, two = median(seconds[1]), median(seconds[2])
    peer = {threads: child(model, out, types, threads, peer=True)[0] for threads in seconds}
    line = {
        "model": model.name, "weights": n_weights, "types": types, "output_bytes": size,
        "seconds_1": round(one, 2), "seconds_2": round(two, 2), "speedup": round(one / two, 3),
        "ggml_seconds_1": round(peer[1], 2), "ggml_seconds_2": round(peer[2], 2),
        "times_ggml_1": round(peer[1] / one, 1), "times_ggml_2": round(peer[2] / two, 1),
        "mweights_per_second": round(n_weights / two / 1e6, 1), "peak_mib": round(peak, 1),
        "same_bytes_1_2_7": len(set(hashes.values())) == 1,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            found.update(piece)
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="a model to convert beside the synthetic one")
    parser.add_argument("--weights", type=float, default=1e9, help="of the synthetic model; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--types", default="Q4_K,Q6_K,Q3_K,Q8_0,Q4_0")
    parser.add_argument("--once", nargs=2, metavar=("OUT", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--ggml", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    types = asked.types.split(",")
    if asked.once:
        once(asked.model, Path(asked.once[0]), types, int(asked.once[1]), peer=asked.ggml)
        return
    with tempfile.TemporaryDirectory() as folder:
        if asked.model:
            bench(asked.model, Path(folder), types, asked.repeats)
        if asked.weights:
            synthetic = Path(folder) / f"synthetic-{asked.weights:.0e}.gguf"
            synthesize(synthetic, asked.weights)
            bench(synthetic, Path(folder), types, asked.repeats)


if __name__ == "__main__":
    main()
