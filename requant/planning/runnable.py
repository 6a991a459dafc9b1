"""Check that the engine runs the types of all tensors, before any plan is searched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from requant.errors import UsageError, brief
from requant.planning.engines import ENGINES, Engine
from requant.planning.solver.problem import allowed_candidates
from requant.scoring.losses import ALREADY_QUANTIZED

if TYPE_CHECKING:
    from requant.planning.constraints import Constraints
    from requant.scoring.losses import Losses


def check_runnable(losses: Losses, constraints: Constraints, engine: Engine) -> None:
    """Raise UsageError where a tensor can only have types that the engine runs on none of its devices.

    The error names the types, the number of tensors, and what helps.
    """
    lacking = engine.runs_nowhere
    if not lacking or not any(lacking & {c.type for c in t.candidates} for t in losses.tensors):
        return
    allowed = zip(losses.tensors, allowed_candidates(losses, constraints), strict=True)
    stuck = {t.name: (t, found) for t, found in allowed if all(c.type in lacking for c in found)}
    if not stuck:
        return
    types = tuple(dict.fromkeys(c.type for _, found in stuck.values() for c in found))
    first, copied = next(iter(stuck)), any(t.reason == ALREADY_QUANTIZED for t, _ in stuck.values())
    who = f"tensor {brief(first)} is" if len(stuck) == 1 else f"{len(stuck)} tensors ({brief(first)}, ...) are"
    others = [
        e.name for e in ENGINES.values() if e.has_gpu == engine.has_gpu and not e.runs_nowhere.intersection(types)
    ]
    ways = ["give --allow-requantize to convert them"] if copied else []
    ways += [f"loosen {option}" for option in constraints.given_rules] if not ways else []
    ways += [f"choose another --engine ({', '.join(others)})"] if others else []
    what = f"{who} {' or '.join(types)}, which {engine.name} does not run"
    raise UsageError(f"{what}; {' or '.join(ways) or 'score more types with --types'}")
