"""Plans against one type for all at the same bytes, judged by the real llama.cpp: a JSON line per model and type.

    python scripts/bench_quality.py [--types Q4_K,Q3_K] [--prompts 24] [--models tiny,smollm2,gemma3]

Both files are made by requant's encoders without an imatrix, the plan to the size that one type for all has (with its
fallbacks). kld: mean KL divergence of the next token from the F16 model, over its 1,000 likeliest tokens, at places
spread over fixtures/eval.txt. SmolLM2 and Gemma 3 come quantized; they are dithered by one step of their grid first.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]
import engine
import real_models
from bench_formats import dithered

from requant import codec
from requant.container.layout import lay_out
from requant.container.output import Output
from requant.container.source import open_source
from requant.convert import convert, output_layout
from requant.formats import by_name
from requant.pipeline import Wishes, make_plan
from requant.recipe import uniform_plan
from requant.sensitivity import score

MODELS = {"tiny": lambda: real_models.TINY, "smollm2": real_models.smollm2, "gemma3": real_models.gemma3}
CONTEXT = 600  # characters before each place
N_LIKELY = 1000


def in_f16(path: Path, out: Path) -> Path:
    """A copy of the model at `path` with its quantized matrices in F16 and off their grid."""
    rng, half = np.random.default_rng(1), by_name("F16")
    with open_source(path) as source:
        types = [t.type_id if t.format.block_weights == 1 else half.type_id for t in source.tensors]
        shapes = [(t.name, t.shape, type_id) for t, type_id in zip(source.tensors, types, strict=True)]
        layout = lay_out(source.metadata.with_values({"general.file_type": ("u32", 1)}), shapes, path)
        with Output(out, layout.size, force=True, inputs=source.identities) as output:
            for tensor, placed in zip(source.tensors, layout.tensors, strict=True):
                data = source.read_rows(tensor)
                if placed.type_id != tensor.type_id:
                    data = codec.quantize(dithered(codec.dequantize(data, tensor.format), rng), half)
                output.write_at(placed.offset, data)
            output.publish(layout.header)
    return out


def prompts(n: int) -> list[str]:
    text = (real_models.FIXTURES / "eval.txt").read_text(encoding="utf-8")
    return [text[i - CONTEXT : i] for i in np.linspace(CONTEXT, len(text), n).astype(int)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="Q4_K,Q3_K")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    asked = prompts(args.prompts)
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models.split(","):
            path = MODELS[model]()
            base = path if model == "tiny" else in_f16(path, Path(folder) / "f16.gguf")
            before = engine.answers(base, *asked, n_tokens=1, n_likely=N_LIKELY)
            with open_source(base) as source:
                losses = score(source)
                for name in args.types.split(","):
                    one = uniform_plan(source, name)
                    size = output_layout(source, one).size
                    found = {}
                    for what, plan in (("one type", one), ("plan", make_plan(source, losses, Wishes(size=size)))):
                        made = convert(source, plan, Path(folder) / "out.gguf", force=True)
                        after = engine.answers(made.output, *asked, n_tokens=1, n_likely=N_LIKELY)
                        found[what] = float(np.mean([engine.divergence(*x) for x in zip(before, after, strict=True)]))
                    line = {"model": model, "type": name, "bytes": size, "kld_one_type": round(found["one type"], 5)}
                    line |= {"kld_plan": round(found["plan"], 5), "ratio": round(found["plan"] / found["one type"], 2)}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
