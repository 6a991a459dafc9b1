"""Hypothesis strategies: Losses of small models, and the figures the solver meets."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from requant.formats import by_name
from requant.model.roles import layer_of
from requant.scoring.losses import Candidate, Losses, TensorLosses

TYPES = ("Q2_K", "Q3_K", "IQ4_NL", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
ROLES = ("attn_q", "attn_v", "ffn_down", "ffn_up")


def candidate(type_name: str, shape: tuple[int, ...], loss: float) -> Candidate:
    fmt = by_name(type_name)
    return Candidate(type_name, fmt.n_bytes(math.prod(shape)), loss, rmse=min(1.0, loss), loss_error=0.01 * loss)


def tensor(
    name: str,
    losses_by_type: dict[str, float],
    shape: tuple[int, ...] = (256, 4),
    *,
    source_type: str = "F16",
    on_gpu: bool = True,
    reason: str | None = None,
    skipped: dict[str, str] | None = None,
) -> TensorLosses:
    """A tensor whose candidates are `losses_by_type` and a copy."""
    types = losses_by_type | {source_type: 0.0}
    candidates = tuple(candidate(t, shape, loss) for t, loss in types.items())
    parts = name.split(".")
    layer = layer_of(name)
    n_bytes = by_name(source_type).n_bytes(math.prod(shape))
    role = parts[2] if layer is not None else parts[0]
    return TensorLosses(name, role, layer, shape, source_type, n_bytes, on_gpu, reason, candidates, skipped or {})


def model(*tensors: TensorLosses) -> Losses:
    return Losses("model.gguf", "0" * 64, "llama", "cfix", "imatrix.gguf", "1" * 64, tensors)


# losses from 1e-8 to 1e2, with ties and zeros: what real models show, and what breaks tolerances
loss = st.one_of(st.just(0.0), st.sampled_from((0.5, 1e-4)), st.floats(-8, 2).map(lambda e: 10.0**e))


@st.composite
def tensor_losses(draw: st.DrawFn, name: str, max_types: int = 4) -> TensorLosses:
    shape = (256, draw(st.integers(1, 40)))
    types = draw(st.lists(st.sampled_from(TYPES), min_size=0, max_size=max_types, unique=True))
    reason = draw(st.sampled_from((None, None, None, "1-D"))) if not types else None
    by_type = {t: draw(loss) for t in types}
    return tensor(name, by_type, shape, on_gpu=draw(st.booleans()), reason=reason)


@st.composite
def losses(draw: st.DrawFn, max_tensors: int = 5, max_types: int = 4) -> Losses:
    count = draw(st.integers(1, max_tensors))
    names = [f"blk.{i // len(ROLES)}.{ROLES[i % len(ROLES)]}.weight" for i in range(count)]
    return model(*(draw(tensor_losses(n, max_types)) for n in names))
