"""Figures that all reports share: bits per weight, percentages, units of losses, reasons with counts."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from statistics import median
from typing import TYPE_CHECKING

from requant.errors import FILE_NAME, REMARK, brief

if TYPE_CHECKING:
    from requant.conversion.record import Conversion


def bits_per_weight(n_bytes: int, n_weights: int) -> float:
    """Return the bits that each of `n_weights` takes; no weights count as one."""
    return 8 * n_bytes / max(n_weights, 1)


def percent(share: float, digits: str = ".1f") -> str:
    """Return `share` of 1 in per cent: `12.5 %`."""
    return f"{100 * share:{digits}} %"


def loss_heading(what: str, unit: str | None) -> str:
    """Return the heading of losses in `unit`: `loss, nats`."""
    return what if unit is None else f"{what}, {unit.split()[0]}"


def count_tensors(tensors: Sized) -> str:
    """Return how many tensors there are: `1 tensor`, `2 tensors`."""
    return f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"


def describe_compensation(made: Conversion) -> str:
    """Return how the rounding of an output was compensated, and by how much its results err less, as a sentence."""
    found = [t.compensation for t in made.tensors if t.compensation is not None]
    name = brief(made.compensation_text or "", FILE_NAME)
    less = f"; it adds {median(c.share for c in found):.2f} times the squared error of plain rounding" if found else ""
    if made.predicted_kl is not None and made.plan.predicted_kl is not None:
        less += f" (median), so predicted KL falls from {made.plan.predicted_kl:.4g} to {made.predicted_kl:.4g} nats"
    n, n_plain = sum(c.n_matrices for c in found), sum(c.n_plain for c in found)
    plain = f"; {n_plain} of {n} matrices are rounded plainly" if n_plain else ""
    if n_unseen := sum(c.n_unseen for c in found):
        plain += f", {n_unseen} of them because too few tokens reach them"
    return f"Rounding of {count_tensors(found)} compensated ({made.plan.compensation}), measured on {name}{less}{plain}"


def reason_lines(pairs: Iterable[tuple[str | None, str]], most: int, *, frequent_first: bool = False) -> list[str]:
    """Return `reason: 2 tensors (names)` for each reason of the (reason, tensor name) pairs; `most` are named."""
    names: dict[str, list[str]] = {}
    for reason, name in pairs:
        names.setdefault(brief(reason or "", REMARK), []).append(name)
    groups = sorted(names.items(), key=lambda item: -len(item[1])) if frequent_first else names.items()
    return [
        f"{reason}: {count_tensors(group)} ({', '.join(map(brief, group[:most]))}{', ...' * (len(group) > most)})"
        for reason, group in groups
    ]
