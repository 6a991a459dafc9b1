"""Predicted against measured divergence, one matrix at a time in one type: a JSON line per matrix, then a summary.

    python scripts/bench/bench_losses.py [--models tiny,smollm2,gemma3] [--type Q4_0] [--step 9] [--windows 4]
        [--markdown]

Every `step`-th matrix. Predicted by the losses from gradients over 8 windows of fixtures/calibration.txt, with the sum
over the tokens of a window inside the square ("per window", what requant does) and with every token on its own ("per
token"); measured by `requant.scoring.evaluate` on windows of fixtures/eval.txt. The real models are dithered off their
grid.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests" / "helpers")]
import real_models
from bench_quality import MODELS, in_f16
from compare import rank_correlation

from requant.container.source import Source, open_source
from requant.formats import by_name, codec
from requant.model.forward.passes import forward, read_head, read_model
from requant.model.forward.weights import Weights
from requant.scoring import fisher
from requant.scoring.calibration_data import WindowSpec, read_text_windows
from requant.scoring.evaluate import judge, summary
from requant.scoring.options import ScoringOptions


def per_token(matrices):
    """fisher._information with every token on its own."""

    def information(matrix, rows, weights):
        return sum((g[:, rows] ** 2).T @ x**2 for x, g in matrices.get(matrix, ()))

    return information


def predicted(source: Source, type_name: str) -> dict[str, float]:
    text = read_text_windows(real_models.FIXTURES / "calibration.txt", source, WindowSpec(n=8))
    codec.warm_up({t.format for t in source.tensors} | {by_name(type_name)})
    losses = fisher.score_by_gradients(source, text, ScoringOptions((type_name,))).losses
    return {t.name: t.candidates[-1].loss for t in losses.tensors if len(t.candidates) > 1}


def rows(source: Source, type_name: str, step: int, n_windows: int):
    fmt = by_name(type_name)
    per_window = predicted(source, type_name)
    with mock.patch.object(fisher, "_information", per_token):
        tokenwise = predicted(source, type_name)
    tokens = read_text_windows(real_models.FIXTURES / "eval.txt", source, WindowSpec(n=n_windows)).windows
    base = read_model(Weights(source))
    reference = read_head(base), forward(base, tokens)
    for name in list(per_window)[::step]:
        weights = Weights(source, lambda t, x, own=name: codec.reconstruct(x, fmt) if t.name == own else x)
        model = read_model(weights)
        kld = summary(judge(read_head(model), forward(model, tokens), tokens, reference), tokens).mean_kld
        yield {"tensor": name, "measured": kld, "per_token": tokenwise[name], "per_window": per_window[name]}


def summarized(found: list[dict]) -> dict:
    measured = np.array([row["measured"] for row in found])
    out = {"matrices": len(found)}
    for form in ("per_token", "per_window"):
        values = np.array([row[form] for row in found])
        out |= {
            f"{form}_spearman": round(rank_correlation(values, measured), 3),
            f"{form}_sum": round(float(values.sum() / measured.sum()), 2),
            f"{form}_geometric_mean": round(float(np.exp(np.log(values / measured).mean())), 2),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--type", default="Q4_0")
    parser.add_argument("--step", type=int, default=9)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            path = MODELS[model][0]()
            base = path if model == "tiny" else in_f16(path, Path(folder) / "f16.gguf")
            found = []
            with open_source(base) as source:
                for row in rows(source, args.type, args.step, args.windows):
                    found.append(row)
                    print(json.dumps({"model": model} | row), flush=True)
            print(json.dumps({"model": model, "type": args.type} | summarized(found)), flush=True)
            for row in found if args.markdown else ():
                ratios = " | ".join(f"{row[form] / row['measured']:.2f}" for form in ("per_token", "per_window"))
                print(f"| {row['tensor']} | {row['measured']:.5f} | {ratios} |")


if __name__ == "__main__":
    main()
