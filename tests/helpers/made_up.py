"""Plans and records of models that do not exist, of any number of layers and roles."""

import math
from pathlib import Path

from requant.conversion.record import Conversion, Converted
from requant.formats import by_name
from requant.planning.constraints import Limit
from requant.planning.plan import Choice, Mixture, Plan

TEXT = "requant's calibration.txt"
TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
DENSE = {
    **{"attn_q": (256, 256), "attn_k": (256, 64), "attn_v": (256, 64), "attn_output": (256, 256)},
    **{"ffn_gate": (256, 768), "ffn_up": (256, 768), "ffn_down": (768, 256)},
}
EXPERTS = {
    **{"attn_q": (8192, 8192), "attn_k": (8192, 1024), "attn_v": (8192, 1024), "attn_output": (8192, 8192)},
    **{f"ffn_{x}_exps": (8192, 2048, 64) for x in ("gate", "up")},
    **{"ffn_down_exps": (2048, 8192, 64), "ffn_up_shexp": (8192, 2048), "ffn_down_shexp": (2048, 8192)},
}
STOCK = {
    **{"Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K"},
    **{"Q4_0": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q5_0": "Q5_K", "Q6_K": "Q6_K", "Q8_0": "Q8_0"},
}


def _choice(place, rank, sensitivity):
    *_, shape = place
    losses = {t: sensitivity * 4 ** -by_name(t).bpw for t in TYPES}
    kind = TYPES[rank % len(TYPES)]
    n_bytes = by_name(kind).n_bytes(math.prod(shape))
    return Choice(*place, "BF16", kind, n_bytes, losses[kind], 0.01, "gpu"), losses


def plan(n_layers=3, roles=None, *, vram=True, **changes):
    """A plan with every candidate's loss and llama-quantize's mixtures, in VRAM and a file."""
    choices, candidates, roles = [], {}, roles or DENSE
    layers = [
        (f"blk.{i}.{role}.weight", role, i, shape) for i in range(n_layers) for role, shape in (roles or DENSE).items()
    ]
    outside = [("token_embd.weight", "token_embd", None, (256, 512)), ("output.weight", "output", None, (256, 512))]
    for k, place in enumerate((*outside, *layers)):
        name, _, layer, _ = place
        sensitivity = 0.05 * (1 + math.sin(0.3 * (layer or 0) + k)) + 0.01
        choice, losses = _choice(place, int(3 + 2 * math.sin(0.7 * k)), sensitivity)
        choices.append(choice)
        candidates[name] = losses
    norm = Choice(
        "output_norm.weight",
        "output_norm",
        None,
        (256,),
        "F32",
        "F32",
        1024,
        0.0,
        0.0,
        "gpu",
        "it is a vector, not a matrix",
    )
    choices.append(norm)
    mixtures = []
    for i, (name, kind) in enumerate(STOCK.items()):
        n_bytes = sum(by_name(kind).n_bytes(c.n_weights) for c in choices[:-1]) * (50 + i % 3) // 50
        mixtures.append(
            Mixture(name, n_bytes, n_bytes, sum(x[kind] for x in candidates.values()) * (1 - 0.05 * (i % 3)))
        )
    total = sum(c.n_bytes for c in choices)
    memory = {"kv_cache": total // 5, "compute": total // 20, "reserve": total // 9}
    other = sum(memory.values())
    limits = (Limit("--vram", (total + other) * 11 // 10, other, device="gpu"), Limit("--size", total * 12 // 10, 4096))
    told = {
        "source": "Invented-3L-BF16.gguf",
        "budget": {"vram": limits[0].budget, "ctx": 8192, "parallel": 1, "cache_type_k": "F16", "cache_type_v": "F16"},
        "limits": limits if vram else limits[1:],
        "memory": memory if vram else {},
        "runtime": {"n_gpu_layers": n_layers + 1, "all_layers": True, "experts_on_cpu": [], "reference_type": "Q4_K"},
        "notes": (f"gradients over 8 windows of 512 tokens of {TEXT}",),
        "solver": "HiGHS",
        "options": ("--vram", "12GiB", "--ctx", "8192"),
    }
    if not vram:
        told["budget"] = {"size": limits[1].budget}
    kept = {"header_sha256": "0" * 64, "arch": "llama", "method": "fisher", "choices": tuple(choices), "gap": 1e-4}
    loss = math.fsum(c.loss for c in choices)
    return Plan(
        **(kept | {"predicted_loss": loss, "candidates": candidates, "mixtures": tuple(mixtures)} | told | changes)
    )


def record(of=None, name="Invented-Q4.gguf", **changes):
    """The record of an output that `of` gave."""
    of = of or plan()
    tensors = tuple(Converted(c.name, c.source_type, c.type, c.n_bytes, 0.05, 0.05, "a" * 64) for c in of.choices)
    told = {"size": of.n_bytes + 4096, "header_sha256": "b" * 64, "version": "0.1.0", "imatrix": TEXT}
    return Conversion(
        **(told | {"output": Path(name), "imatrix_sha256": "c" * 64, "plan": of, "tensors": tensors} | changes)
    )
