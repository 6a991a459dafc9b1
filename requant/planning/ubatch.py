"""The batch (ubatch) of a plan: the largest that leaves room for the weights, or a smaller one that halves the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.model.engine_settings import DEFAULT_UBATCH, EngineSettings
from requant.model.memory import (
    DEFAULT_RESERVE,
    RESERVE_SHARE,
    Memory,
    compute_bytes,
    memory_for,
    shrink_batch,
)
from requant.planning.solver.problem import constrain

if TYPE_CHECKING:
    from requant.model.hyperparameters import Hyperparameters
    from requant.planning.constraints import Constraints
    from requant.planning.deployment import Deployment
    from requant.planning.plan import Plan
    from requant.scoring.losses import Losses

_MIN_UBATCH = 32  # tokens; the least that shrink_batch goes to
_WORTH = 0.05  # of the weights on the GPU: the memory that a smaller batch must free before it can halve their loss


def describe_batch(before: int, after: int) -> str:
    """The note of a plan for smaller batches."""
    return (
        f"the compute buffer of a batch of {before} leaves too little for weights: "
        f"the plan is for batches of {after}, which read prompts more slowly"
    )


def halve_batches() -> Iterator[int]:
    """Yield the default batch and its halves, down to the smallest."""
    n_ubatch = DEFAULT_UBATCH
    while n_ubatch >= _MIN_UBATCH:
        yield n_ubatch
        n_ubatch //= 2


def smaller_batches(hp: Hyperparameters, settings: EngineSettings, plan: Plan) -> Iterator[int]:
    """Yield halves of the plan's batch, while each frees enough of the VRAM for the weights to gain much."""
    settings = replace(settings, n_ubatch=plan.budget["ubatch"])
    weights = sum(c.n_bytes for c in plan.choices if c.device == "gpu")
    while settings.tokens > _MIN_UBATCH:
        smaller = replace(settings, n_ubatch=max(_MIN_UBATCH, settings.tokens // 2))
        if compute_bytes(hp, settings) - compute_bytes(hp, smaller) < _WORTH * weights:
            return
        yield smaller.n_ubatch
        settings = smaller


def fit_batch(
    deployment: Deployment, constraints: Constraints, to_try: Iterable[Losses], *, default_reserve: bool
) -> tuple[Deployment, tuple[str, ...]]:
    """Return the deployment with the largest batch that leaves room for the smallest plan, and notes for the user.

    The smallest plan keeps the output's floor if any batch leaves room for that: `to_try` are the losses with the
    floor, then those without. `constraints`: those of all layers on the GPU. `default_reserve`: the reserve is not
    given but depends on the budget.
    """
    assert deployment.vram is not None
    beside = sum(deployment.parts.values())
    for losses in to_try:
        smallest = beside + constrain(losses, constraints).least_cost(-1)
        memory = shrink_batch(deployment.hp, deployment.memory, deployment.vram, smallest)
        if memory.weights_limit(deployment.vram) >= smallest:
            break
    else:
        memory = _smallest_memory(deployment, smallest, default_reserve=default_reserve)
    before, after = deployment.settings.n_ubatch, memory.settings.n_ubatch
    return replace(deployment, memory=memory), (() if before == after else (describe_batch(before, after),))


def _smallest_memory(deployment: Deployment, smallest: int, *, default_reserve: bool) -> Memory:
    """The memory at the smallest batch, so that the error names a budget that will do for `smallest` bytes of weights.

    A default reserve grows with the budget, so it is the one of that larger budget.
    """
    least = memory_for(deployment.hp, replace(deployment.settings, n_ubatch=_MIN_UBATCH), reserve=0)
    if not default_reserve:
        return replace(least, reserve=deployment.memory.reserve)
    needed = least.total + smallest
    return replace(least, reserve=min(DEFAULT_RESERVE, -(-needed // (RESERVE_SHARE - 1))))
