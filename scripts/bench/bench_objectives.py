"""What an encoder should minimise, judged by the logits of whole models: a JSON line per type, model and importance.

    python scripts/bench/bench_objectives.py [--models tiny,smollm2] [--types Q4_K,...] [--windows 32] [--markdown]

Our encoders minimise the importance-weighted squared error ("plain"). ggml's weigh it by the weights themselves as
well, large ones more, in ways that differ by type (below). Every matrix in the layers that the type's block divides is
encoded by our encoder for either objective, with the shrinkage of few bits half undone ("ours", the default), and by
ggml's encoder; kld is the mean KL divergence of the next token from the F16 model over the second halves of windows
of 256 tokens of eval.txt. The last columns are relative to plain, with the standard error of the paired difference
between windows. The importance is the tiny model's imatrix; SmolLM2's comes from a pass over calibration.txt. SmolLM2
is dithered off its grid.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "helpers"))
import ggml
import real_models
from bench_quality import in_f16

from requant.container.imatrix import Imatrix, importance_for, read_imatrix
from requant.container.source import Source, open_source
from requant.formats import BlockFormat, Effort, by_name, codec
from requant.formats.encoders import shrinkage
from requant.model.forward.passes import Tokens, forward, read_head, read_model
from requant.model.forward.weights import Weights
from requant.scoring.calibrate import calibrate
from requant.scoring.calibration_data import WindowSpec, read_text_windows
from requant.scoring.evaluate import judge
from requant.scoring.options import StatisticsOptions

TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q4_0,Q4_1,Q5_0,Q5_1,IQ4_NL,IQ4_XS,IQ3_S,IQ3_XXS,IQ2_S,IQ2_XS,IQ2_XXS,IQ1_M,IQ1_S"
WINDOW = 256  # tokens
NEED_IMPORTANCE = ("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")  # in ggml; all columns alike otherwise
Encode = Callable[[np.ndarray, BlockFormat, np.ndarray | None], np.ndarray]


def ours(x: np.ndarray, fmt: BlockFormat, importance: np.ndarray | None) -> np.ndarray:
    return codec.quantize(x, fmt, importance)


def plain(x: np.ndarray, fmt: BlockFormat, importance: np.ndarray | None) -> np.ndarray:
    """Ours, but left where least squares has it."""
    with mock.patch.object(shrinkage, "_scale", lambda halves, factors: None):
        return codec.quantize(x, fmt, importance)


def as_ggml_weighs(x: np.ndarray, fmt: BlockFormat, importance: np.ndarray | None) -> np.ndarray:
    """Our encoder with the weights of ggml-quants.c: a factor for each weight beside the importance of its column."""
    columns = np.ones(x.shape[1], np.float32) if importance is None else codec.scaled_importance(importance)
    weights = columns * emphasis(x, fmt.name, importance is not None)
    weights = np.maximum(weights / weights.mean(), codec.IMPORTANCE_FLOOR).astype(np.float32)
    blocks = np.empty(x.size // fmt.block_weights, fmt.kernels.LAYOUT)
    shape = (-1, fmt.block_weights)
    with mock.patch.object(shrinkage, "_scale", lambda halves, factors: None):
        fmt.kernels.encode(x.reshape(shape), weights.reshape(shape), blocks, Effort.DEFAULT.value)
    return blocks.view(np.uint8).reshape(len(x), -1)


def emphasis(x: np.ndarray, name: str, weighted: bool) -> np.ndarray:
    """quantize_row_*_impl with importance or where ggml demands it, quantize_row_*_ref without."""
    if weighted and name == "Q6_K":
        return np.ones_like(x)
    if weighted or name in NEED_IMPORTANCE:
        over = x.shape[1] if name[:2] in ("Q4", "Q5") and name[-1] in "01" else 32 if name == "IQ4_NL" else 256
        factor = 1.0 if over == x.shape[1] or name in ("Q2_K", "IQ2_XXS", "IQ2_XS") else 2.0
        return np.sqrt(factor * mean_square(x, over) + x * x)
    if name in ("Q4_K", "Q5_K"):
        return np.sqrt(mean_square(x, 32)) + np.abs(x)
    if name == "Q2_K":
        return np.abs(x)
    return np.ones_like(x) if name[-1] in "01" else x * x  # legacy types are rounded once


def mean_square(x: np.ndarray, over: int) -> np.ndarray:
    parts = (x * x).reshape(-1, over).mean(1, keepdims=True)
    return np.repeat(parts, over, axis=1).reshape(x.shape)


def by_ggml(x: np.ndarray, fmt: BlockFormat, importance: np.ndarray | None) -> np.ndarray:
    return np.frombuffer(ggml.quantize_chunk(fmt.type_id, x, importance), np.uint8).reshape(len(x), -1)


def encoded(source: Source, fmt: BlockFormat, imatrix: Imatrix | None, encode: Encode) -> Weights:
    """The model with the matrices of its layers that can have the type in it."""

    def change(tensor, x):
        if not tensor.name.startswith("blk.") or len(tensor.shape) < 2 or not fmt.divides(tensor.n_per_row):
            return x
        importance = None if imatrix is None else importance_for(imatrix, tensor.name, tensor.shape)[0]
        return codec.dequantize(encode(np.ascontiguousarray(x), fmt, importance), fmt)

    return Weights(source, change)


def measure(name: str, types: list[str], n_windows: int, folder: Path) -> Iterator[dict]:
    path = real_models.TINY if name == "tiny" else in_f16(real_models.smollm2(), folder / "f16.gguf")
    with open_source(path) as source:
        text = read_text_windows(real_models.FIXTURES / "calibration.txt", source, WindowSpec(WINDOW))
        measured = None if name == "tiny" else calibrate(source, text.windows, StatisticsOptions(gradients=False))
        imatrix = read_imatrix(real_models.IMATRIX) if measured is None else measured.imatrix(source, text.name)
        tokens = read_text_windows(real_models.FIXTURES / "eval.txt", source, WindowSpec(WINDOW)).windows[:n_windows]
        base = read_model(Weights(source))
        reference = read_head(base), forward(base, tokens)
        for fmt in map(by_name, types):
            for weights in (None, imatrix):
                found = [
                    divergences(encoded(source, fmt, weights, encode), tokens, reference)
                    for encode in (plain, as_ggml_weighs, ours, by_ggml)
                ]
                yield {"type": fmt.name, "model": name, "imatrix": weights is not None} | figures(*found)


def divergences(weights: Weights, tokens: Tokens, reference: tuple) -> np.ndarray:
    """The mean of each window's scored tokens."""
    model = read_model(weights)
    judged = judge(read_head(model), forward(model, tokens), tokens, reference)
    return judged.kld.reshape(len(tokens), -1).mean(axis=1)


def figures(plain: np.ndarray, emphasized: np.ndarray, ours: np.ndarray, peer: np.ndarray) -> dict:
    """Of the divergences, one for each window."""
    found = {"plain": plain, "ggml_weights": emphasized, "ours": ours, "ggml_encoder": peer}
    mean = {f"kld_{what}": round(float(kld.mean()), 5) for what, kld in found.items()}
    return mean | {
        f"{what}_over_plain": [round(float(x), 3) for x in relative(found[what], plain)]
        for what in ("ggml_weights", "ours")
    }


def relative(kld: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """Mean of the paired difference over that of `base`, and its standard error."""
    difference = kld - base
    return difference.mean() / base.mean(), difference.std(ddof=1) / np.sqrt(len(base)) / base.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tiny,smollm2")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--windows", type=int, default=32, help="of the tiny model; a quarter of them of SmolLM2")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/benchmarks.md instead")
    args = parser.parse_args()
    if args.markdown:
        print("| type | model | imatrix | plain | ggml's weights | ours | ggml's encoder | its weights | ours |")
        print("|---|---|:-:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            windows = args.windows if model == "tiny" else args.windows // 4
            for row in measure(model, args.types.split(","), windows, Path(folder)):
                print(as_markdown(row) if args.markdown else json.dumps(row), flush=True)


def as_markdown(row: dict) -> str:
    klds = " | ".join(f"{row[f'kld_{what}']:.4f}" for what in ("plain", "ggml_weights", "ours", "ggml_encoder"))
    share, error = row["ggml_weights_over_plain"]
    mended = f"{100 * row['ours_over_plain'][0]:+.1f} ± {100 * row['ours_over_plain'][1]:.1f} %"
    weighed = f"{100 * share:+.1f} ± {100 * error:.1f} %"
    return f"| {row['type']} | {row['model']} | {'yes' if row['imatrix'] else 'no'} | {klds} | {weighed} | {mended} |"


if __name__ == "__main__":
    main()
