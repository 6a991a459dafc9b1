"""The guard rail of losses without gradients: the output is never below what a stock mixture of that size gives it.

Such losses can misjudge one large tensor, and nothing after the output repairs an error in the logits. A tied embedding
is held to what the mixture gives an untied one: held to the output's type, it took so much of a small model that the
rest suffered more (seen on SmolLM2-135M, against one type for all at the same bytes).
"""

from __future__ import annotations

import re
from dataclasses import replace

from requant.formats import format_of
from requant.model.mixtures import default_type, mixture_names
from requant.model.roles import is_below, is_tied
from requant.planning.constraints import Constraints, Use, allowed_devices
from requant.planning.plan import use_of
from requant.scoring.losses import Candidate, Losses, TensorLosses

GRADIENT_FREE = ("cfix", "dfix")


def with_output_floor(losses: Losses, constraints: Constraints) -> Losses:
    """`losses` without the output's (or a tied embedding's) candidates below its type in the largest stock mixture.

    That is the largest that would meet the constraints's limits; where none does, there is nothing to hold on to. What the
    user pinned is left alone, and so is a tensor that would be left with a copy of more bits than asked for.
    """
    tied = is_tied({t.name for t in losses.tensors})
    bounded = any(limit.unit == "bytes" for limit in constraints.limits)
    mixture = _largest_mixture(losses, constraints) if losses.method in GRADIENT_FREE and bounded else None
    if mixture is None:
        return losses
    last = "token_embd.weight" if tied else "output.weight"
    tensors = []
    for tensor in losses.tensors:
        held = tensor.name == last and tensor.reason is None and not _pinned(tensor.name, constraints)
        guard = default_type(mixture, last, tensor.shape[0], tied=False, arch=losses.arch) if held else None
        tensors.append(tensor if guard is None else _without_smaller(tensor, guard, constraints.types))
    return losses if tensors == list(losses.tensors) else replace(losses, tensors=tuple(tensors))


def _largest_mixture(losses: Losses, constraints: Constraints) -> str | None:
    """The last of the mixtures whose sizes, to a first approximation, meet every limit."""

    def n_bytes(tensor: TensorLosses, mixture: str) -> int:
        if tensor.reason is not None:
            return tensor.n_bytes
        fmt = format_of(default_type(mixture, tensor.name, tensor.shape[0], tied=False, arch=losses.arch))
        return min(tensor.n_bytes, fmt.n_bytes(tensor.n_weights))

    def use(tensor: TensorLosses, size: int) -> Use:
        return use_of(Candidate("", size, 0.0), allowed_devices(tensor, constraints)[0], tensor.role, 1.0, None)

    def fits(mixture: str) -> bool:
        return all(
            limit.unit != "bytes"
            or limit.other + sum(limit.cost(use(t, n_bytes(t, mixture))) for t in losses.tensors) <= limit.budget
            for limit in constraints.limits
        )

    return next((mixture for mixture in reversed(mixture_names()) if fits(mixture)), None)


def _pinned(name: str, constraints: Constraints) -> bool:
    named = {"output.weight": constraints.output_type, "token_embd.weight": constraints.embedding_type}
    return named.get(name) is not None or any(re.search(rule.pattern.lower(), name) for rule in constraints.pins)


def _without_smaller(tensor: TensorLosses, guard: str, types: tuple[str, ...]) -> TensorLosses:
    """The tensor with the candidates that the guard leaves, a copy always among them."""
    kept = tuple(c for c in tensor.candidates if c.type == tensor.source_type or not is_below(c.type, guard))
    chosen_from = [c for c in kept if c.type != tensor.source_type and (not types or c.type in types)]
    if not chosen_from and not is_below(tensor.source_type, guard) and tensor.source_type != guard:
        return tensor
    reason = f"{tensor.role} is not below {guard} in a plan of this size, as in llama-quantize's mixtures"
    lost = {c.type: reason for c in tensor.candidates if c not in kept}
    return replace(tensor, candidates=kept, skipped={**tensor.skipped, **lost})
