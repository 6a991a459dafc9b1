"""Plans against llama-quantize's mixtures at the same bytes: measured KL divergence, a JSON line per model and mixture.

    python scripts/bench/bench_quality.py [--models tiny,smollm2,gemma3] [--mixtures Q2_K,..] [--columns a,e,fast]
        [--windows 8,32] [--text fixtures/calibration.txt] [--markdown]

For each mixture, at its size: a the mixture with ggml's encoders; b the mixture with ours; c our plan without data; d
with an imatrix; e from gradients on text; r from gradients on random tokens; f random allocations (the best of three
seeds); fast and best: the plan e, compensated on --windows of 512 tokens of --text, or of the text that ships with
requant. All but c are encoded with the same imatrix, made by `calibrate` from fixtures/calibration.txt;
`requant.scoring.evaluate` gives the divergence from the F16 model on fixtures/eval.txt, over as many windows of 512 as
the golden figures of llama-perplexity have (45, 16 and 8), and for e, fast and best on fixtures/eval_technical.txt
too, a text of another kind. SmolLM2 and Gemma 3 come quantized; they are dithered by one step of their grid first, or
the old grid would win every comparison.
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
from conversions import convert

from requant.container.imatrix import importance_for
from requant.container.layout import lay_out
from requant.container.part import PartFile
from requant.container.source import open_source
from requant.conversion.compensation.token_weights import weigh_tokens
from requant.conversion.compensation.walk import CompensationText
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
from requant.scoring.calibration_data import WindowSpec, drawn_windows, read_text_windows, shipped_windows
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
TEXTS = ("eval.txt", "eval_technical.txt")


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

    def __init__(self, source, n_windows, types, columns):
        self.source = source
        self.imatrix = self._imatrix()
        texts = [read_text_windows(FIXTURES / name, source, WindowSpec()) for name in TEXTS]
        self.tokens = [text.windows[:n_windows] for text in texts]
        base = read_model(Weights(source))
        self.reference = read_head(base), forward(base, np.concatenate(self.tokens))
        text = read_text_windows(FIXTURES / "calibration.txt", source, WindowSpec(n=8))
        options = ScoringOptions(types, self.imatrix)
        codec.warm_up({t.format for t in source.tensors} | {by_name(name) for name in types})
        begun = time.perf_counter()
        on_text = score_by_gradients(source, text, options).losses
        self.seconds = time.perf_counter() - begun
        self.losses = {"e": on_text}
        if "c" in columns:
            self.losses["c"] = score(source, ScoringOptions(types))
        if "d" in columns:
            self.losses["d"] = score(source, options)
        if "r" in columns:
            self.losses["r"] = score_by_gradients(source, drawn_windows(source, WindowSpec(n=8)), options).losses

    def _imatrix(self):
        windows = read_text_windows(FIXTURES / "calibration.txt", self.source, WindowSpec()).windows
        statistics = calibrate(self.source, windows, StatisticsOptions(gradients=False))
        return statistics.imatrix(self.source, "calibration.txt")

    def measure(self, weights, n_texts=1):
        """The figures of a model on the first texts, each against F16."""
        model, tokens = read_model(weights), self.tokens[:n_texts]
        x, (head, base) = forward(model, np.concatenate(tokens)), self.reference
        found, first = [], 0
        for own in tokens:
            part = slice(first, first + len(own))
            found.append(summary(judge(read_head(model), x[part], own, (head, base[part])), own))
            first = part.stop
        return found

    def kld(self, weights):
        return self.measure(weights)[0].mean_kld

    def weigh(self, n_windows, path):
        """A text with the weights of its tokens, and how long weighing them took."""
        size = WindowSpec(n=n_windows)
        text = read_text_windows(path, self.source, size) if path else shipped_windows(self.source, size)
        model, begun = read_model(Weights(self.source)), time.perf_counter()
        weights = weigh_tokens(model, text.windows)
        return CompensationText(text.name, model, text.windows, weights), time.perf_counter() - begun

    def compensated(self, plan, text, how, folder):
        """The figures of a plan that is converted with compensation, and how long that took."""
        out, begun = Path(folder) / "compensated.gguf", time.perf_counter()
        how, plan = replace(text, best=how == "best"), replace(plan, compensation=how)
        convert(self.source, plan, out, imatrix=self.imatrix, compensation=how, force=True)
        seconds = time.perf_counter() - begun
        with open_source(out) as made:
            return self.measure(Weights(made), len(TEXTS)), seconds

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
        return planned_weights(self.source, plan, self.imatrix if imatrix else None)


def measure(bench, mixture, columns, texts, folder):
    """One row: the divergence of each of the columns."""
    hp = read_hyperparameters(bench.source.metadata, bench.source.tensors)
    types = mixture_types(mixture, bench.source.tensors, hp, has_imatrix=True)
    size = sum(
        by_name(types[t.name]).n_bytes(t.n_weights) if t.name in types else t.n_bytes for t in bench.source.tensors
    )
    found = {"mixture": mixture, "bytes": size}
    if "a" in columns:
        found["a"] = bench.mixture(types)
    if "b" in columns:
        found["b"] = bench.kld(bench.planned(bench.of_types(types, bench.losses["e"])))
    for which in "cdr":
        if which in columns:
            found[which] = bench.kld(bench.planned(bench.plan(which, size), imatrix=which != "c"))
    if "f" in columns:
        drawn = [bench.kld(bench.planned(bench.random_plan(size, seed))) for seed in range(3)]
        found |= {"f": min(drawn), "f_mean": float(np.mean(drawn))}
    plan = bench.plan("e", size)
    found["predicted"] = plan.predicted_loss
    found |= _figures("e", bench.measure(bench.planned(plan), len(TEXTS)))
    for how in ("fast", "best"):
        for n, (text, seconds) in texts.items() if how in columns else ():
            name = how if len(texts) == 1 else f"{how} {n}"
            figures, spent = bench.compensated(plan, text, how, folder)
            found |= _figures(name, figures) | {f"{name}_seconds": round(seconds + spent, 1)}
    return found


def _figures(name, found):
    own, other = found
    return {
        name: own.mean_kld,
        f"{name}_p999": own.p999_kld,
        f"{name}_same_top": own.same_top,
        f"{name}_technical": other.mean_kld,
    }


def markdown(rows):
    """The divergences over that of `a`, those of compensated plans over that of `e` too, and their geometric means."""
    first = "a" if "a" in rows[0] else "e"
    columns = [k.removesuffix("_same_top") for k in rows[0] if k.endswith("_same_top")]
    ratios = [(name, first) for name in [*"bcdrf", *columns] if name in rows[0] and name != first]
    others = columns[1:]
    ratios += [(name, "e") for name in others if first != "e"]
    ratios += [(f"{name}_technical", "e_technical") for name in others]
    heads = [f"{a}/{b}".replace("_", " ") for a, b in ratios]
    print(f"| model | mixture | bytes | {first}, nats | " + " | ".join(heads) + " |")
    print("|---|---|" + "--:|" * (2 + len(ratios)))
    for r in rows:
        own = " | ".join(f"{r[a] / r[b]:.2f}" for a, b in ratios)
        print(f"| {r['model']} | {r['mixture']} | {r['bytes']:,} | {r[first]:.4f} | {own} |")
    for model in dict.fromkeys(r["model"] for r in rows):
        own = [r for r in rows if r["model"] == model]
        means = [math.exp(np.mean([math.log(r[a] / r[b]) for r in own])) for a, b in ratios]
        print(f"| {model} | geometric mean | | | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    if not others:
        return
    heads = [f"{name}, {what}" for name in columns for what in ("same top token", "99.9 % of tokens, nats")]
    print("\n| model | mixture | " + " | ".join(heads) + " |\n|---|---|" + "--:|" * len(heads))
    for r in rows:
        cells = [f"{100 * r[f'{name}_same_top']:.1f} % | {r[f'{name}_p999']:.3f}" for name in columns]
        print(f"| {r['model']} | {r['mixture']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--mixtures", default=MIXTURES)
    parser.add_argument("--types", default=",".join(engine_named("llama.cpp").candidates))
    parser.add_argument("--columns", default="a,b,c,d,e,r,f,fast,best")
    parser.add_argument("--windows", default="32", help="of 512 tokens, to compensate with; several: a column for each")
    parser.add_argument("--text", type=Path, help="to compensate with, by default the one that ships with requant")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    rows, columns, windows = [], args.columns.split(","), [int(n) for n in args.windows.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            path, n_windows = MODELS[model]
            base = path() if model == "tiny" else in_f16(path(), Path(folder) / "f16.gguf")
            with open_source(base) as source:
                bench = Bench(source, n_windows, tuple(args.types.split(",")), columns)
                compensates = {"fast", "best"} & set(columns)
                texts = {n: bench.weigh(n, args.text) for n in windows} if compensates else {}
                print(json.dumps({"model": model, "score_seconds": round(bench.seconds, 1)}), file=sys.stderr)
                for mixture in args.mixtures.split(","):
                    rows.append({"model": model} | measure(bench, mixture, columns, texts, folder))
                    print(json.dumps(rows[-1]), flush=True)
    if args.markdown:
        markdown(rows)


if __name__ == "__main__":
    main()
