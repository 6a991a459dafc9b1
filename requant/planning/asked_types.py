"""Types that a request gives tensors by name: they are candidates also where they save nothing."""

from __future__ import annotations

from dataclasses import replace

from requant.formats import by_name as format_named
from requant.model.roles import candidates, is_below
from requant.planning.constraints import Constraints
from requant.planning.rule_matches import deciding_pins
from requant.scoring.losses import TOO_SMALL, Candidate, Losses, TensorLosses


def add_asked_types(losses: Losses, constraints: Constraints) -> Losses:
    """Return `losses` with the types that pins name as candidates, for tensors that would not get them otherwise.

    They save nothing there, or are below the floor of the role. The loss of such a type is taken as 0, and a note says
    so. Types that the tensor cannot have are not added.
    """
    rules, _ = deciding_pins(losses, constraints)
    tensors = tuple(
        t if (rule := rules.get(i)) is None else allow_type(t, rule.type, losses.arch, by_name=True)
        for i, t in enumerate(losses.tensors)
    )
    n = sum(new is not old for new, old in zip(tensors, losses.tensors, strict=True))
    if not n:
        return losses
    what = "1 tensor has" if n == 1 else f"{n} tensors have"
    note = f"{what} a type that was not scored there, as asked for by name; its loss counts as 0"
    return replace(losses, tensors=tensors, notes=(*losses.notes, note))


def allow_type(tensor: TensorLosses, type_name: str, arch: str, *, by_name: bool = False) -> TensorLosses:
    """Return the tensor with `type_name` as a candidate, if all that speaks against it is that it saves nothing.

    by_name: the user asks for it for this tensor, so it may also be below the floor of the role.
    """
    fmt = format_named(type_name)
    if fmt is None or not fmt.can_encode or tensor.reason not in (None, TOO_SMALL):
        return tensor
    if any(c.type == type_name for c in tensor.candidates):
        return tensor
    args = arch, tensor.name, tensor.shape, [type_name]
    saves = tensor.reason is None and is_below(type_name, tensor.source_type)
    usual, _ = candidates(*args, has_importance=False)
    suitable, _ = candidates(*args, has_importance=False, by_name=by_name)
    if not suitable or (saves and usual):
        return tensor
    found = Candidate(type_name, fmt.n_bytes(tensor.n_weights), 0.0)
    skipped = {name: reason for name, reason in tensor.skipped.items() if name != type_name}
    return replace(tensor, reason=None, candidates=(*tensor.candidates, found), skipped=skipped)
