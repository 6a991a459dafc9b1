"""Plans against llama-quantize's mixtures at the same bytes: measured KL divergence, a JSON line per model and mixture.

    python scripts/bench/bench_quality.py [--models tiny,smollm2,gemma3] [--mixtures Q2_K,..] [--seeds 3] [--markdown]

For each mixture, at its size: kld_a the mixture with ggml's encoders; kld_b the mixture with ours; kld_c our plan
without data; kld_d with an imatrix; kld_e from gradients on text; kld_r from gradients on random tokens; kld_f random
allocations (the best and the mean of the seeds). All but c are encoded with the same imatrix, made by `calibrate` from
fixtures/calibration.txt; `requant.scoring.evaluate` gives the divergence from the F16 model on fixtures/eval.txt, over
as many windows of 512 as the golden figures of llama-perplexity have (45, 16 and 8). SmolLM2 and Gemma 3 come
quantized; they are dithered by one step of their grid first, or the old grid would win every comparison.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests" / "helpers")]
import ggml
import real_models
from bench_formats import dithered

from requant.container.imatrix import importance_for
from requant.container.layout import lay_out
from requant.container.part import PartFile
from requant.container.source import open_source
from requant.formats import by_name, codec
from requant.model.forward.passes import forward, read_head, read_model
from requant.model.forward.weights import Weights
from requant.model.hyperparameters import read_hyperparameters
from requant.model.mixtures import mixture_types
from requant.planning.constraints import Constraints, size_limit
from requant.planning.engines import ONLY_FOR_ODD_ROWS, engine_named
from requant.planning.output_floor import with_output_floor
from requant.planning.rerank import planned_weights
from requant.planning.solver.solve import solve
from requant.scoring.calibrate import calibrate
from requant.scoring.calibration_data import WindowSpec, drawn_windows, read_text_windows
from requant.scoring.evaluate import judge, summary
from requant.scoring.fisher import score_by_gradients
from requant.scoring.layerwise import score
from requant.scoring.options import ScoringOptions, StatisticsOptions

MODELS = {
    "tiny": (lambda: real_models.TINY, 45),
    "smollm2": (real_models.smollm2, 16),
    "gemma3": (real_models.gemma3, 8),
}
MIXTURES = "Q2_K,IQ3_S,Q3_K_M,IQ4_XS,Q4_K_M,Q5_K_M"
FIXTURES = real_models.FIXTURES


def in_f16(path: Path, out: Path) -> Path:
    """A copy of the model at `path` with its quantized matrices in F16 and off their grid."""
    rng, half = np.random.default_rng(1), by_name("F16")
    with open_source(path) as source:
        types = [t.type_id if t.format.block_weights == 1 else half.type_id for t in source.tensors]
        shapes = [(t.name, t.shape, type_id) for t, type_id in zip(source.tensors, types, strict=True)]
        layout = lay_out(source.metadata.with_values({"general.file_type": ("u32", 1)}), shapes, path)
        with PartFile(out, layout.size, force=True) as output:
            for tensor, placed in zip(source.tensors, layout.tensors, strict=True):
                data = source.read_rows(tensor)
                if placed.type_id != tensor.type_id:
                    data = codec.quantize(dithered(codec.dequantize(data, tensor.format), rng), half)
                output.write_at(placed.offset, data)
            output.publish(layout.header)
    return out


class Bench:
    """A model with its F16 logits, imatrix and losses."""

    def __init__(self, source, n_windows, types):
        self.source = source
        self.imatrix = self._imatrix()
        self.tokens = read_text_windows(FIXTURES / "eval.txt", source, WindowSpec()).windows[:n_windows]
        base = read_model(Weights(source))
        self.reference = read_head(base), forward(base, self.tokens)
        text = read_text_windows(FIXTURES / "calibration.txt", source, WindowSpec(n=8))
        options = ScoringOptions(types, self.imatrix)
        codec.warm_up({t.format for t in source.tensors} | {by_name(name) for name in types})
        begun = time.perf_counter()
        on_text = score_by_gradients(source, text, options).losses
        self.seconds = time.perf_counter() - begun
        random = drawn_windows(source, WindowSpec(n=8))
        self.losses = {
            "c": score(source, ScoringOptions(types)),
            "d": score(source, options),
            "e": on_text,
            "r": score_by_gradients(source, random, options).losses,
        }

    def _imatrix(self):
        windows = read_text_windows(FIXTURES / "calibration.txt", self.source, WindowSpec()).windows
        statistics = calibrate(self.source, windows, StatisticsOptions(gradients=False))
        return statistics.imatrix(self.source, "calibration.txt")

    def kld(self, weights):
        model = read_model(weights)
        return summary(
            judge(read_head(model), forward(model, self.tokens), self.tokens, self.reference), self.tokens
        ).mean_kld

    def mixture(self, types):
        """The mixture with ggml's encoders."""

        def change(tensor, x):
            if tensor.name not in types:
                return x
            fmt, importance = by_name(types[tensor.name]), importance_for(self.imatrix, tensor.name, tensor.shape)
            own = None if importance is None else importance[0]
            return ggml.decode(fmt.type_id, ggml.quantize_chunk(fmt.type_id, x, own)).reshape(x.shape)

        return self.kld(Weights(self.source, change))

    def plan(self, which, size):
        losses, constraints = self.losses[which], Constraints((size_limit(size, 0),), odd_rows=ONLY_FOR_ODD_ROWS)
        return solve(with_output_floor(losses, constraints), constraints)

    def of_types(self, types, losses):
        """A plan of these types, from one that allows everything."""
        plan = solve(losses, Constraints(limits=(size_limit(2**60, 0),)))
        choices = tuple(replace(c, type=types.get(c.name, c.type)) for c in plan.choices)
        return replace(plan, choices=choices)

    def random_plan(self, size, seed):
        """Types drawn at random: from the smallest of all, random steps up as long as they fit."""
        rng = np.random.default_rng(seed)
        free = [t for t in self.losses["e"].tensors if t.reason is None]
        rest = sum(t.n_bytes for t in self.losses["e"].tensors if t.reason is not None)
        chosen = {t.name: min(t.candidates, key=lambda c: c.n_bytes) for t in free}
        total = rest + sum(c.n_bytes for c in chosen.values())
        steps = [(t.name, c) for t in free for c in t.candidates]
        for i in rng.permutation(len(steps)):
            name, candidate = steps[i]
            larger = candidate.n_bytes - chosen[name].n_bytes
            if 0 < larger <= size - total:
                chosen[name], total = candidate, total + larger
        return self.of_types({name: c.type for name, c in chosen.items()}, self.losses["e"])

    def planned(self, plan, imatrix=True):
        return self.kld(planned_weights(self.source, plan, self.imatrix if imatrix else None))


def measure(bench, mixture, seeds):
    hp = read_hyperparameters(bench.source.metadata, bench.source.tensors)
    types = mixture_types(mixture, bench.source.tensors, hp, has_imatrix=True)
    size = sum(
        by_name(types[t.name]).n_bytes(t.n_weights) if t.name in types else t.n_bytes for t in bench.source.tensors
    )
    found = {"mixture": mixture, "bytes": size, "kld_a": bench.mixture(types)}
    found["kld_b"] = bench.planned(bench.of_types(types, bench.losses["e"]))
    for which in "cder":
        plan = bench.plan(which, size)
        found[f"kld_{which}"] = bench.planned(plan, imatrix=which != "c")
        if which == "e":
            found["predicted_e"] = plan.predicted_loss
    if seeds:
        drawn = [bench.planned(bench.random_plan(size, seed)) for seed in range(seeds)]
        found |= {"kld_f_best": min(drawn), "kld_f_mean": float(np.mean(drawn))}
    return found


def markdown(rows):
    print("| model | mixture | bytes | a, nats | b/a | c/a | d/a | e/a | e'/a | f/a, best of seeds |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in rows:
        ratios = " | ".join(f"{r[k] / r['kld_a']:.2f}" for k in ("kld_b", "kld_c", "kld_d", "kld_e", "kld_r"))
        best = f"{r['kld_f_best'] / r['kld_a']:.2f}" if "kld_f_best" in r else ""
        print(f"| {r['model']} | {r['mixture']} | {r['bytes']:,} | {r['kld_a']:.4f} | {ratios} | {best} |")
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        means = [
            math.exp(np.mean([math.log(r[k] / r["kld_a"]) for r in own]))
            for k in ("kld_b", "kld_c", "kld_d", "kld_e", "kld_r")
        ]
        print(f"| {model} | geometric mean | | | " + " | ".join(f"{m:.2f}" for m in means) + " | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--mixtures", default=MIXTURES)
    parser.add_argument("--types", default=",".join(engine_named("llama.cpp").candidates))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            path, n_windows = MODELS[model]
            base = path() if model == "tiny" else in_f16(path(), Path(folder) / "f16.gguf")
            with open_source(base) as source:
                bench = Bench(source, n_windows, tuple(args.types.split(",")))
                print(json.dumps({"model": model, "score_seconds": round(bench.seconds, 1)}), file=sys.stderr)
                for mixture in args.mixtures.split(","):
                    rows.append({"model": model} | measure(bench, mixture, args.seeds))
                    print(json.dumps(rows[-1]), flush=True)
    if args.markdown:
        markdown(rows)


if __name__ == "__main__":
    main()
