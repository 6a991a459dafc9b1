"""A model's layers in one line each, for tools that place layers on devices by more than their size.

They stand in the plan's file and, as `requant.layer.*` arrays with one item per layer, in the output's metadata:
docs/engines.md is the contract, LAYERS_SCHEMA its version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from requant.container.source import Source
from requant.errors import BadInput
from requant.formats import by_name
from requant.model.hyperparameters import read_hyperparameters
from requant.model.mixtures import mixture_names, mixture_types
from requant.planning.plan import Choice, LayerSummary, Mixture, Plan
from requant.scoring.losses import Losses, TensorLosses

LAYERS_SCHEMA = "requant.layers/1"
REFERENCE_BPW = 4.5  # sensitivities are losses at about so many bits


def reference_type(losses: Losses) -> str:
    """The scored type whose bits per weight are nearest to 4.5, Q4_K of equals: what sensitivities are measured at."""
    scored = {c.type for t in losses.tensors if t.reason is None for c in t.candidates}
    return min(scored, key=lambda name: (abs(_bpw(name) - REFERENCE_BPW), name != "Q4_K", name), default="")


def nearest_type(types: Iterable[str], reference: str) -> str:
    """Return `reference` if it is among `types`, else the one of the nearest bits per weight, the first of equals."""
    return min(types, key=lambda name: (name != reference, abs(_bpw(name) - _bpw(reference))))


def summarize_layers(plan: Plan, losses: Losses, caches: Sequence[int]) -> tuple[LayerSummary, ...]:
    """One summary per layer, then one for what is in no layer. `caches`: bytes of each layer's KV cache, () unknown."""
    reference = reference_type(losses)
    measured = losses.method != "" and plan.predicted_loss is not None
    tensors = {t.name: t for t in losses.tensors}
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
            sensitivity=_sensitivity([tensors[c.name] for c in groups[layer]], reference) if measured else None,
        )
        for layer in (*layers, *([None] if None in groups else []))
    )


def _sensitivity(tensors: Sequence[TensorLosses], reference: str) -> float:
    """The loss if every matrix had the reference type, or its candidate of the nearest size."""
    total = []
    for tensor in tensors:
        if tensor.reason is None:
            losses = {c.type: c.loss for c in tensor.candidates}
            total.append(losses[nearest_type(losses, reference)])
    return math.fsum(total)


def _bpw(name: str) -> float:
    fmt = by_name(name)
    return 0.0 if fmt is None else fmt.bpw


def compare_mixtures(source: Source, losses: Losses, *, has_imatrix: bool) -> tuple[Mixture, ...]:
    """Every mixture whose types were all scored, by rising size; () where the model's shape cannot be read.

    Tensors that stay as they are in a plan do so here.
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
