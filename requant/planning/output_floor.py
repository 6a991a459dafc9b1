"""Output floor: the output, where losses are without gradients, is not below its type in a mixture of the plan's size.

Such losses can misjudge one large tensor, and nothing after the output repairs an error in the logits. The floor of a
tied embedding is the mixture's type for an untied one: with the output's type as its floor, it took so much of a small
model that the rest suffered more (seen on SmolLM2-135M, against one type for all at the same bytes).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.errors import InfeasibleBudget
from requant.formats import format_of
from requant.model.mixtures import default_type, mixture_names
from requant.model.roles import is_below, is_tied
from requant.planning.solver.solve import REL_GAP, TIME_LIMIT, Solution, solve_or_explain
from requant.scoring.losses import Candidate, Losses, TensorLosses

if TYPE_CHECKING:
    from requant.planning.constraints import Constraints

GRADIENT_FREE = ("cfix", "dfix")


def solve_with_floor(
    losses: Losses,
    constraints: Constraints,
    *,
    time_limit: float = TIME_LIMIT,
    rel_gap: float = REL_GAP,
    why: bool = True,
) -> Solution:
    """Solve with the output floor; without it, and with a note, where the budget is too small for it."""
    held, *free = losses_to_try(losses, constraints)
    try:
        return solve_or_explain(held, constraints, time_limit=time_limit, rel_gap=rel_gap, why=why)
    except InfeasibleBudget:
        if not free:
            raise
    solution = solve_or_explain(losses, constraints, time_limit=time_limit, rel_gap=rel_gap, why=why)
    note = "the budget is too small to keep the output at the type of llama-quantize's mixtures"
    return replace(solution, plan=replace(solution.plan, notes=(*solution.plan.notes, note)))


def losses_to_try(losses: Losses, constraints: Constraints) -> tuple[Losses, ...]:
    """The losses to plan from: those with the output floor, then, if these differ, all."""
    held = with_output_floor(losses, constraints)
    return (losses,) if held is losses else (held, losses)


def with_output_floor(losses: Losses, constraints: Constraints) -> Losses:
    """Return `losses` without the output's (or tied embedding's) candidates below its type in a llama-quantize mixture.

    The mixture is the largest that meets the limits; where none does, there is no floor. A tensor that the user pinned
    has no floor, and neither has one that could then only be copied, with more bits than the floor.
    """
    tied = is_tied({t.name for t in losses.tensors})
    bounded = any(limit.unit == "bytes" for limit in constraints.limits)
    mixture = _largest_mixture(losses, constraints) if losses.method in GRADIENT_FREE and bounded else None
    if mixture is None:
        return losses
    last = "token_embd.weight" if tied else "output.weight"
    tensors = []
    for tensor in losses.tensors:
        held = tensor.name == last and tensor.reason is None and not _is_pinned(tensor.name, constraints)
        floor = default_type(mixture, last, tensor.shape[0], tied=False, arch=losses.arch) if held else None
        tensors.append(tensor if floor is None else _drop_below(tensor, floor, constraints.types))
    return losses if tensors == list(losses.tensors) else replace(losses, tensors=tuple(tensors))


def _largest_mixture(losses: Losses, constraints: Constraints) -> str | None:
    """The largest mixture whose approximate sizes meet every limit in bytes."""

    def n_bytes(tensor: TensorLosses, mixture: str) -> int:
        if tensor.reason is not None:
            return tensor.n_bytes
        fmt = format_of(default_type(mixture, tensor.name, tensor.shape[0], tied=False, arch=losses.arch))
        return min(tensor.n_bytes, fmt.n_bytes(tensor.n_weights))

    def fits(mixture: str) -> bool:
        uses = [
            constraints.use(t, Candidate("", n_bytes(t, mixture), 0.0), constraints.allowed_devices(t)[0])
            for t in losses.tensors
        ]
        limits = [limit for limit in constraints.limits if limit.unit == "bytes"]
        return all(sum(limit.cost(use) for use in uses) <= limit.room for limit in limits)

    return next((mixture for mixture in reversed(mixture_names()) if fits(mixture)), None)


def _is_pinned(name: str, constraints: Constraints) -> bool:
    named = {"output.weight": constraints.output_type, "token_embd.weight": constraints.embedding_type}
    return named.get(name) is not None or any(re.search(rule.pattern.lower(), name) for rule in constraints.pins)


def _drop_below(tensor: TensorLosses, floor: str, types: tuple[str, ...]) -> TensorLosses:
    """Return the tensor without candidates below the floor; a copy stays among them."""
    left = tuple(c for c in tensor.candidates if c.type == tensor.source_type or not is_below(c.type, floor))
    usable = [c for c in left if c.type != tensor.source_type and (not types or c.type in types)]
    if not usable and not is_below(tensor.source_type, floor) and tensor.source_type != floor:
        return tensor
    reason = f"{tensor.role} is not below {floor} in a plan of this size, as in llama-quantize's mixtures"
    dropped = {c.type: reason for c in tensor.candidates if c not in left}
    return replace(tensor, candidates=left, skipped={**tensor.skipped, **dropped})
