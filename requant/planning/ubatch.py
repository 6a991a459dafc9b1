"""The batch (ubatch) of a plan: what a larger one takes from the weights, and the largest beside given weights.

The smallest batch leaves most room for the weights. It doubles, up to the default, where the weights have had so much
room that the doubling takes at most a small share of it. Until a larger budget pays for the doubling, the room stays
the same. So a larger budget never leaves less room for the weights, and never makes a plan worse.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from requant.common.units import format_size
from requant.errors import InfeasibleBudget
from requant.model.engine_settings import DEFAULT_UBATCH
from requant.model.memory import DEFAULT_RESERVE, RESERVE_SHARE, Memory, memory_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from requant.model.hyperparameters import Hyperparameters
    from requant.planning.plan import Plan

BATCHES = (32, 64, 128, 256, DEFAULT_UBATCH)  # tokens, by rising size
BATCH_SHARE = 20  # a batch doubles where that takes at most one part in so many of the room for the weights


def batch_memories(hp: Hyperparameters, memory: Memory) -> tuple[Memory, ...]:
    """Return the memory with each of `BATCHES`, and the reserve of `memory`."""
    settings = memory.settings
    return tuple(memory_for(hp, replace(settings, n_ubatch=n), reserve=memory.reserve) for n in BATCHES)


def weights_room(memories: Sequence[Memory], vram: int, smallest: int) -> int:
    """Return the bytes of `vram` for weights that no larger budget makes fewer.

    memories: with each batch, by rising size. smallest: bytes of the smallest weights; while they fit beside the
    smallest batch, the result is no less.
    """
    rooms = [memory.weights_limit(vram) for memory in memories]
    doublings = [larger.total - memory.total for memory, larger in pairwise(memories)]
    enough = [max(BATCH_SHARE * n, smallest) for n in doublings]  # room from which the next batch is worth its bytes
    return max(rooms[-1], *map(min, rooms, enough))


def largest_batch(memories: Sequence[Memory], vram: int, weights: int) -> Memory:
    """Return the memory with the largest batch that leaves `weights` bytes; with the smallest where none does."""
    return next((x for x in reversed(memories) if x.weights_limit(vram) >= weights), memories[0])


def smallest_memory(memories: Sequence[Memory], smallest: int, *, default_reserve: bool) -> Memory:
    """Return the memory with the smallest batch for the error that names a budget for `smallest` bytes of weights.

    A default reserve grows with the budget, so it is the one of that larger budget.
    """
    if not default_reserve:
        return memories[0]
    needed = memories[0].total - memories[0].reserve + smallest
    return replace(memories[0], reserve=min(DEFAULT_RESERVE, -(-needed // (RESERVE_SHARE - 1))))


def describe_batch(plan: Plan, usual: Plan | InfeasibleBudget) -> str:
    """Return the note of a plan for a smaller batch; `usual`: the plan, or the error, for the default batch."""
    what = f"the plan is for batches of {plan.budget['ubatch']}, which read prompts more slowly; -ub {DEFAULT_UBATCH}"
    if isinstance(usual, InfeasibleBudget):
        return f"{what} leaves too little for weights"
    if "max_loss" in plan.budget:
        return f"{what} would cost {format_size(max(usual.n_bytes - plan.n_bytes, 0))}"
    before, after = plan.predicted_loss or 0.0, usual.predicted_loss or 0.0
    return f"{what} would cost {after - before:.3g} of loss ({after:.3g} instead of {before:.3g})"
