"""Summaries of a plan: its layers with their sensitivity, and llama-quantize's mixtures for comparison.

The layers are for tools that place them on devices. They are part of the plan's file and, as `requant.layer.*` arrays
with one item per layer, of the output's metadata: docs/engines.md is the contract, LAYERS_SCHEMA its version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from requant.errors import BadInput
from requant.formats import by_name
from requant.model.hyperparameters import read_hyperparameters
from requant.model.mixtures import mixture_names, mixture_types
from requant.planning.plan import Choice, LayerSummary, Mixture, Plan
from requant.scoring.losses import UNSCORED

if TYPE_CHECKING:
    from requant.container.source import Source
    from requant.scoring.losses import Losses

LAYERS_SCHEMA = "requant.layers/1"
REFERENCE_BPW = 4.5  # sensitivities are losses at about so many bits per weight


def reference_type(losses: Losses) -> str:
    """The type of all sensitivities: the scored one whose bits per weight are nearest to 4.5, Q4_K of equals."""
    scored = {c.type for t in losses.tensors if t.reason is None for c in t.candidates}
    return min(scored, key=lambda name: (abs(_bpw(name) - REFERENCE_BPW), name != "Q4_K", name), default="")


def nearest_type(types: Iterable[str], reference: str) -> str:
    """Return `reference` if it is among `types`, else the one of the nearest bits per weight, the first of equals."""
    return min(types, key=lambda name: (name != reference, abs(_bpw(name) - _bpw(reference))))


def summarize_layers(plan: Plan, losses: Losses, caches: Sequence[int]) -> tuple[LayerSummary, ...]:
    """One summary per layer, then one for tensors outside all layers.

    `caches`: bytes of each layer's KV cache, () where they are not known.
    """
    reference = reference_type(losses)
    measured = losses.method not in ("", UNSCORED) and plan.predicted_loss is not None
    sensitivities = {}
    for tensor in losses.tensors:
        if tensor.reason is None:
            by_type = {c.type: c.loss for c in tensor.candidates}
            sensitivities[tensor.name] = by_type[nearest_type(by_type, reference)]
    groups: dict[int | None, list[Choice]] = {}
    for choice in plan.choices:
        groups.setdefault(choice.layer, []).append(choice)
    layers = sorted(layer for layer in groups if layer is not None)
    return tuple(
        LayerSummary(
            layer=layer,
            device="+".join(sorted({c.device for c in groups[layer]} - {"none"}, reverse=True)) or "none",
            n_bytes=sum(c.n_bytes for c in groups[layer]),
            kv_bytes=caches[layer] if layer is not None and layer < len(caches) else 0,
            loss=math.fsum(c.loss for c in groups[layer]),
            sensitivity=math.fsum(sensitivities.get(c.name, 0.0) for c in groups[layer]) if measured else None,
        )
        for layer in (*layers, *([None] if None in groups else []))
    )


def _bpw(name: str) -> float:
    fmt = by_name(name)
    return 0.0 if fmt is None else fmt.bpw


def compare_mixtures(source: Source, losses: Losses, *, has_imatrix: bool) -> tuple[Mixture, ...]:
    """Return every mixture whose types were all scored, by rising size; () where the model's shape cannot be read.

    Tensors that stay as they are in a plan stay so in a mixture.
    """
    try:
        hp = read_hyperparameters(source.metadata, source.tensors)
    except BadInput:
        return ()
    found = []
    for name in mixture_names():
        types = mixture_types(name, source.tensors, hp, has_imatrix=has_imatrix)
        chosen = [
            next((c for c in t.candidates if c.type == (t.source_type if t.reason else types.get(t.name))), None)
            for t in losses.tensors
        ]
        scored = [c for c in chosen if c is not None]
        if len(scored) == len(chosen):
            on_gpu = sum(c.n_bytes for c, t in zip(scored, losses.tensors, strict=True) if t.on_gpu)
            loss = math.fsum(c.loss for c in scored)
            found.append(Mixture(name, sum(c.n_bytes for c in scored), on_gpu, loss))
    return tuple(sorted(found, key=lambda m: m.n_bytes))
