"""Write docs/reference/architectures.md: the architectures that requant runs, and how near it comes to llama.cpp.

    python scripts/docs/architectures.py            # compares with llama.cpp, which requant[engine] installs
    python scripts/docs/architectures.py --check    # exit code 1 if the page is stale; its agreements are taken as read

The models are those of tests/model/forward: random weights, layers of each kind that the architecture has.
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]

import engine_logits
from model.forward import families
from model.forward.architectures import MAKERS

from requant.container.source import open_source
from requant.model.forward.families import FAMILIES
from requant.model.forward.layer import NullHook
from requant.model.forward.passes import EMBEDDING, forward, log_probabilities, read_head, read_model
from requant.model.forward.side_inputs import TABLE
from requant.model.forward.tape import Node
from requant.model.forward.weights import Weights
from requant.model.roles import never_quantize

PAGE = ROOT / "docs" / "reference" / "architectures.md"
N_TOKENS = 100
BOUNDS = (1e-5, 3e-5, 1e-4, 5e-2)
HEADS = ("architecture", "mixers", "feed-forward parts", "matrices scored", "difference to llama.cpp")
TEXT = """# Architectures

requant runs these architectures itself: `score`, `calibrate`, `evaluate`, `plan` and `convert` measure with them. A
layer has one of the mixers and one of the feed-forward parts, with the parts that stand behind a `+` (those with `?`
where it has them). [Extending](../extending.md#adding-an-architecture) says how to add one. The table is made by
`scripts/docs/architectures.py` from small random models with every kind of layer.

*Matrices scored*: of those that may be quantized, how many get a loss from gradients. An indexer is not run: windows
within its reach do not need it. *Difference to llama.cpp*: the largest difference in the log probability of any token
at any of {n} positions, beyond a sliding window, the original context and a chunk of a recurrence; llama.cpp keeps F32
caches. In the Gemma models the engine takes GELU from a table of 16 bits.

"""


class Seen(NullHook):
    """A hook that remembers the matrices whose products it saw."""

    def __init__(self, prefix, names):
        self.prefix, self.names = prefix, names

    def inputs(self, name, expert, x):
        """Remember the matrix."""
        self.names.add(self.prefix + name)


def models(folder):
    """Return architecture -> files of models of it."""
    found = {}
    for name, make in MAKERS.items():
        found.setdefault(make(0).arch, []).append(make(1).write(folder / f"{name}.gguf"))
    for name, family in families.FAMILIES.items():
        if family.arch in FAMILIES:
            path = folder / f"old-{name}.gguf"
            families.write(name, path, seed=1)
            found.setdefault(family.arch, []).append(path)
    return found


def run(path, tokens):
    """Return the matrices that are scored, those that may be quantized, and log probabilities (n_tokens, n_vocab)."""
    with open_source(path) as source:
        model = read_model(Weights(source, dtype=np.float64))
        index, names = [0], {EMBEDDING, TABLE, model.output_name}

        def after(layer):
            index[0] = layer.index + 1

        x = forward(model, tokens[None], hook=lambda _: Seen(f"blk.{index[0]}.", names), on_layer=after, threads=1)
        head = read_head(model)
        likely = log_probabilities(head.logits(head.normalize(Node(x[0])).value)[0])[0]
        free = {
            t.name for t in source.tensors if never_quantize(model.architecture.hp.arch, t.name, t.shape, 0) is None
        }
    return names & free, free, likely


def rows(agreements):
    """Yield the cells of each architecture; agreements: those to print, or None to measure them."""
    tokens = np.random.default_rng(0).integers(0, 256, N_TOKENS, np.int32)
    with tempfile.TemporaryDirectory() as folder:
        found = models(Path(folder))
        paths = [path for of_one in found.values() for path in of_one]
        exact = engine_logits.log_probabilities(paths, tokens, Path(folder)) if agreements is None else {}
        for name, family in FAMILIES.items():
            if name not in found:
                continue
            scored, free, most = 0, 0, 0.0
            for path in found[name]:
                own, all_, likely = run(path, tokens)
                scored, free = scored + len(own), free + len(all_)
                most = max(most, np.abs(likely - exact[path]).max()) if exact else most
            bound = next(f"{bound:.0e}" for bound in BOUNDS if most <= bound) if exact else agreements[name]
            share = f"{100 * scored / free:.3g} %"
            yield f"`{name}`", family.mixers, family.feeds, share, bound


def page(agreements):
    """Return the text of the page."""
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|---|--:|--:|"]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(agreements)]
    return TEXT.format(n=N_TOKENS) + "\n".join(lines) + "\n"


def main(words):
    if words != ["--check"]:
        PAGE.write_text(page(None), encoding="utf-8")
        return 0
    written = PAGE.read_text(encoding="utf-8")
    agreements = dict(re.findall(r"^\| `([^`]+)` .* (\S+) \|$", written, re.M))
    if agreements.keys() <= FAMILIES.keys() and len(agreements) >= len(FAMILIES) - 1 and page(agreements) == written:
        return 0
    print(f"{PAGE.name} is stale: run python scripts/docs/architectures.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
