"""The guard rail of losses without gradients: the output is never below what a stock mixture of that size gives it.

Such losses can misjudge one large tensor, and nothing after the output repairs an error in the logits.
"""

from __future__ import annotations

import re
from dataclasses import replace

from requant.budget import Request
from requant.model.roles import is_below, is_tied
from requant.model.stock import guard_type
from requant.plan import Limit, Losses, TensorLosses

GRADIENT_FREE = ("cfix", "dfix")


def guarded(losses: Losses, request: Request) -> Losses:
    """`losses` without the output's (or a tied embedding's) candidates below the stock type of the budget's size.

    What the user pinned is left alone, and so is a tensor that would be left with a copy of more bits than asked for.
    """
    sizes = [bpw for limit in request.limits if (bpw := _bpw(losses, limit)) is not None]
    if losses.method not in GRADIENT_FREE or not sizes:
        return losses
    tied = is_tied({t.name for t in losses.tensors})
    tensors = []
    for tensor in losses.tensors:
        guard = (
            guard_type(min(sizes), tensor.name, tensor.shape[0], tied=tied, arch=losses.arch) if tensor.shape else None
        )
        free = guard is not None and tensor.reason is None and not _pinned(tensor.name, request)
        tensors.append(_without_smaller(tensor, guard, request.types) if free and guard is not None else tensor)
    return losses if tensors == list(losses.tensors) else replace(losses, tensors=tuple(tensors))


def _bpw(losses: Losses, limit: Limit) -> float | None:
    """Bits that the limit leaves for each weight it is over."""
    n_weights = sum(t.n_weights for t in losses.tensors if t.on_gpu or not limit.gpu_only)
    return 8 * (limit.budget - limit.other) / n_weights if n_weights else None


def _pinned(name: str, request: Request) -> bool:
    named = {"output.weight": request.output_type, "token_embd.weight": request.embedding_type}
    return named.get(name) is not None or any(re.search(rule.pattern.lower(), name) for rule in request.pins)


def _without_smaller(tensor: TensorLosses, guard: str, types: tuple[str, ...]) -> TensorLosses:
    """The tensor with the candidates that the guard leaves, a copy always among them."""
    kept = tuple(c for c in tensor.candidates if c.type == tensor.source_type or not is_below(c.type, guard))
    chosen_from = [c for c in kept if c.type != tensor.source_type and (not types or c.type in types)]
    if not chosen_from and not is_below(tensor.source_type, guard) and tensor.source_type != guard:
        return tensor
    reason = f"{tensor.role} is not below {guard} in a plan of this size, as in llama-quantize's mixtures"
    lost = {c.type: reason for c in tensor.candidates if c not in kept}
    return replace(tensor, candidates=kept, skipped={**tensor.skipped, **lost})
