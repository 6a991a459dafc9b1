"""CPU seconds and peak memory of `score` for random models of each kind of layer, against a llama; a Markdown table.

    python scripts/bench/bench_architectures.py [--windows 2] [--types Q4_K] [--layers 8]

Each model has about 100 M weights at the given depth, and is scored in a process of its own by two threads, at this
depth and at half of it. Seconds are per 100 M weights; of experts all count, though a token passes a quarter of them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

import numpy as np
from model.forward import architectures as made

from requant.container.source import open_source

WIDTH, HEADS, KV, HEAD, N_FF = 1024, 16, 4, 64, 3072
NEMOTRON = "MFMAMFMF"
KEYS = {
    **{"context_length": 4096, "embedding_length": WIDTH, "feed_forward_length": N_FF, "attention__head_count": HEADS},
    **{"attention__head_count_kv": KV, "attention__key_length": HEAD, "attention__value_length": HEAD},
    "rope__dimension_count": HEAD,
}


def attention(model, **options):
    model.attention(heads=HEADS, kv=KV, size=HEAD, **options)


def llama(model, il):
    model.norms("attn_norm", "ffn_norm")
    attention(model)
    model.dense(N_FF)


def qwen35(model, il):
    model.norms(*made.AFTER)
    attention(model, norm="head", wide=2) if il % 4 == 3 else model.delta_net(keys=8, values=16, size=HEAD)
    model.dense(N_FF)


def gemma4(model, il):
    if il == 0:
        model.add("M:rope_freqs.weight", HEAD // 2, low=1, high=8)
    model.norms(*made.SANDWICH)
    attention(model, norm="head")
    model.dense(N_FF)
    model.add("layer_output_scale.weight", 1, low=0.5)


def gpt_oss(model, il):
    model.norms(*made.AFTER)
    attention(model, biases="qkvo")
    model.add("attn_sinks.weight", HEADS, low=-1, high=2)
    model.experts(n=448, biases=True)


def lfm2(model, il):
    model.norms("attn_norm", "ffn_norm")
    attention(model, norm="head") if il % 3 == 2 else model.convolution()
    model.dense(N_FF)


def nemotron(model, il):
    model.norms("attn_norm")
    kind = NEMOTRON[il % 8]
    if kind == "M":
        model.mamba(2 * WIDTH, state=HEAD, heads=32, groups=2)
    elif kind == "A":
        attention(model)
    else:
        model.dense(4 * WIDTH, gated=False)


def architectures(n):
    """Return architecture -> the function that adds a layer, its layers, and its keys, at depth `n`."""
    deep = 2 * n  # layers of nemotron_h are half of others
    windows = {"attention__sliding_window": 128}
    experts = made.MOE | {"expert_feed_forward_length": 448}
    delta = {"ssm__inner_size": WIDTH, "ssm__state_size": HEAD, "ssm__time_step_rank": 16, "ssm__group_count": 8}
    mamba = {"ssm__inner_size": 2 * WIDTH, "ssm__state_size": HEAD, "ssm__time_step_rank": 32, "ssm__group_count": 2}
    kinds = [NEMOTRON[il % 8] for il in range(deep)]
    own_kv = {"attention__head_count_kv": [KV if il % 3 == 2 else 0 for il in range(n)]}
    widths = {"feed_forward_length": [4 * WIDTH if kind == "F" else 0 for kind in kinds]}
    pattern = {"attention__sliding_window_pattern": [il % 6 != 5 for il in range(n)]}
    return {
        "llama": (llama, n, {}),
        "qwen35": (qwen35, n, made.DELTA | delta),
        "gemma4": (gemma4, n, windows | pattern),
        "gpt-oss": (gpt_oss, n, windows | experts),
        "lfm2": (lfm2, n, own_kv | {"shortconv__l_cache": 3, "norm": "token_embd_norm"}),
        "nemotron_h": (
            *(nemotron, deep),
            {"attention__head_count_kv": [KV if kind == "A" else 0 for kind in kinds], "ssm__conv_kernel": 4}
            | mamba
            | widths,
        ),
    }


def score(path, options):
    """Return the CPU seconds and the peak bytes of `requant score`."""
    ids = path.with_name("ids.txt")
    tokens = np.random.default_rng(0).integers(0, 256, 512 * options.windows)
    ids.write_text(" ".join(map(str, tokens)))
    words = ["-m", "requant", "score", path, "-o", path.with_suffix(".json"), "--tokens", ids, "--types", options.types]
    command = [sys.executable, *map(str, words), "--threads", "2", "--force", "-q"]
    silent = {"stdout": subprocess.DEVNULL, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    process = subprocess.Popen(command, cwd=path.parent, **silent)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{path.name}: exit code {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--types", default="Q4_K")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    made.WIDTH = WIDTH
    made.Model.norms.__kwdefaults__["n"] = made.Model.experts.__kwdefaults__["width"] = WIDTH
    print("| architecture | weights | CPU s per 100 M weights | / llama | peak memory | with half the layers |")
    print("|---|--:|--:|--:|--:|--:|")
    first = None
    for name in architectures(options.layers):
        found = []
        for depth in (options.layers, options.layers // 2):
            make, n_layers, keys = architectures(depth)[name]
            made.model(name, n_layers=n_layers, **(KEYS | keys))(make)
            with tempfile.TemporaryDirectory() as folder:
                path = made.MAKERS[name](1).write(Path(folder) / "model.gguf")
                with open_source(path) as source:
                    weights = sum(tensor.n_weights for tensor in source.tensors)
                found.append((weights, *score(path, options)))
        (weights, seconds, peak), (_, _, half) = found
        each = seconds / weights * 1e8
        first = first or each
        cells = f"{weights / 1e6:.0f} M", f"{each:.1f}", f"{each / first:.2f}", f"{peak / 2**20:.0f} MiB"
        print(f"| `{name}` | {' | '.join(cells)} | {half / 2**20:.0f} MiB |", flush=True)


if __name__ == "__main__":
    main()
