"""llama-quantize's mixtures beside a plan: their size and loss for the same model, by the same losses."""

from __future__ import annotations

import math

from requant.container.source import Source
from requant.errors import BadInput
from requant.model.hyperparameters import read_hyperparameters
from requant.model.stock import mixture_types, mixtures
from requant.plan import Losses, Mixture


def compared(source: Source, losses: Losses, *, has_imatrix: bool) -> tuple[Mixture, ...]:
    """Every mixture whose types were all scored, by rising size; () where the model's shape cannot be read.

    Tensors that stay as they are in a plan do so here.
    """
    try:
        hp = read_hyperparameters(source.metadata, source.tensors)
    except BadInput:
        return ()
    found = []
    for name in mixtures():
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
