"""Plans and records that nobody solved: a large model with experts, and one whose every string is hostile."""

import math
from pathlib import Path

from hostile import EVERYTHING, TRIED

from requant.conversion.record import Anomalies, Conversion, Converted
from requant.formats import by_name
from requant.model.roles import layer_of, role_of
from requant.planning.constraints import Limit
from requant.planning.plan import Choice, Mixture, Plan
from requant.scoring.evaluate import Evaluation

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_WIDTH, _EXPERTS = 2048, 64
_SHAPES = {
    "attn_q": (_WIDTH, 4096),
    "attn_k": (_WIDTH, 512),
    "attn_v": (_WIDTH, 512),
    "attn_output": (4096, _WIDTH),
    "ffn_gate_exps": (_WIDTH, 768, _EXPERTS),
    "ffn_up_exps": (_WIDTH, 768, _EXPERTS),
    "ffn_down_exps": (768, _WIDTH, _EXPERTS),
}
# markup that an escape would have to miss in text, in an attribute, in a script
MARKUP = (
    "</script><script>document.title='owned'</script>",
    "\"'><img src=x onerror=document.title='owned'>",
    "' onmouseover='document.title=1' x='",
    "<!--<script>",
    "&lt;b&gt; &amp; ${title} $title",
    "javascript:document.title='owned'",
)


def tensor(name, shape, type_name, loss=0.0, **how):
    """A choice for a matrix in F16."""
    n_bytes = by_name(type_name).n_bytes(math.prod(shape))
    role, layer = role_of(name), layer_of(name)
    error = 0.0 if type_name == "F16" else 0.5 / 2 ** by_name(type_name).bpw
    return Choice(name, role, layer, shape, "F16", type_name, n_bytes, loss, error, "gpu", **how)


def experts(n_layers=80):
    """A plan of `n_layers` layers with experts; the last bytes went to the first and the last of them."""
    choices, candidates = [], {}
    for layer in (None, *range(n_layers)):
        shapes = {"token_embd": (_WIDTH, 32000), "output": (_WIDTH, 32000)} if layer is None else _SHAPES
        for k, (role, shape) in enumerate(shapes.items()):
            depth = 0.5 if layer is None else abs(2 * layer / n_layers - 1)
            losses = {t: 1e-3 * 10 ** (2 * depth - k / 3 - 0.55 * i) for i, t in enumerate(TYPES)}
            picked = TYPES[min(int(1 + 4 * depth), 5)]
            name = f"{role}.weight" if layer is None else f"blk.{layer}.{role}.weight"
            choices.append(tensor(name, shape, picked, losses[picked]))
            candidates[name] = losses
        if layer is not None:
            choices.append(
                tensor(f"blk.{layer}.attn_norm.weight", (_WIDTH,), "F16", reason="it is a vector, not a matrix")
            )
    total = sum(c.n_bytes for c in choices)
    memory = {"kv_cache": 2**31, "compute": 2**29, "reserve": 2**30}
    limit = Limit("--vram", total + sum(memory.values()) + 2**28, sum(memory.values()), "gpu")
    mixtures = tuple(
        Mixture(n, int(total * f), int(total * f), 0.9 / f**6) for n, f in (("Q3_K_M", 0.9), ("Q4_K_M", 1.1))
    )
    return Plan(
        *("experts.gguf", "00" * 32, "qwen3moe", "fisher", {"vram": limit.budget, "ctx": 32768}, (limit,), memory),
        *(tuple(choices), math.fsum(c.loss for c in choices), 0.001, "within 0.1 % by HiGHS"),
        runtime={"n_gpu_layers": n_layers + 1, "all_layers": True, "reference_type": "Q4_K"},
        candidates=candidates,
        mixtures=mixtures,
    )


def hostile():
    """A record, and its evaluations, of which every string that a file can hold tries to be more."""
    strings = [*MARKUP, *TRIED.values(), "x" * 100_000]
    choices, candidates, written = [], {}, []
    for i, text in enumerate(strings):
        name = f"blk.{i % 3}.{text}.{i}.weight"
        choices.append(tensor(name, (256, 4), TYPES[i % 5], 0.01, reason=None if i % 4 else text, notes=(text,)))
        candidates[name] = {t: 0.1 / (k + 1) for k, t in enumerate(TYPES)}
        odd = Anomalies(nonfinite=1, first_nonfinite=3) if i % 5 == 0 else None
        written.append(Converted(name, "F16", TYPES[i % 5], choices[-1].n_bytes, 0.081, 0.09, "00" * 32, odd))
    every = EVERYTHING + "".join(MARKUP)
    plan = Plan(
        *(every, every, every, every, {"vram": 2**20, every: every, "tensor_type": strings}),
        *((Limit(every, 2**30, 64),), {every: 7}, tuple(choices), 0.01 * len(choices), 0.0, every),
        notes=tuple(strings),
        runtime={"reference_type": "Q4_K", "draft": every},
        candidates=candidates,
        mixtures=tuple(Mixture(text, 9000 + 97 * i, 0, 0.5 / (i + 1)) for i, text in enumerate(strings[:8])),
    )
    made = Conversion(
        Path(every.replace("/", "_")), 99, every, every, every, every, plan, tuple(written), tuple(strings)
    )
    figures = (2, 512, 510, 9.0, 0.1, 8.9, 0.01, 0.001, 0.1, 0.2, 0.97)
    return made, [Evaluation(*figures, model=text, base=text, text=text) for text in strings]


def record(plan):
    """A record of the plan, its errors close to the predicted ones, with two evaluations: of it, and of another."""
    written = tuple(
        Converted(c.name, "F16", c.type, c.n_bytes, c.rmse * (1 + i / 1e4), c.rmse * 1.1, "ab" * 32)
        for i, c in enumerate(plan.choices)
    )
    size = plan.n_bytes + 4096
    made = Conversion(Path("out.gguf"), size, "cd" * 32, "0.0.0", "text.txt", "ef" * 32, plan, written, ("a note",))
    figures = (28, 512, 7140, 51.234, 1.5, 50.123, 0.04321, 0.00021, 0.2345, 0.4567, 0.9321)
    own = Evaluation(*figures, model="out.gguf", header_sha256="cd" * 32, base="experts.gguf", text="eval.txt")
    return made, [own, Evaluation(*figures, model="else.gguf", header_sha256="00" * 32, text="other.txt")]
