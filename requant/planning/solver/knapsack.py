"""The multiple-choice knapsack: one option per item, least sum of losses, every sum of costs within its room.

The duals of the linear relaxation price a byte of each limit. The prices bound the loss from below; repairing the
priced choice bounds it from above; an option whose price alone lifts the lower bound over the upper one is out (Dyer,
Kayal and Walker 1984; Kellerer, Pferschy and Pisinger, Knapsack Problems, 11.2). HiGHS solves what is left, often a
few dozen items. A choice is accepted by its costs in whole bytes: floats only propose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from requant.planning.solver import highs
from requant.planning.solver.highs import Floats, Ints

_SCALE = 1e4  # the loss above every item's least in HiGHS: far above its absolute tolerances of 1e-6, far below 1e15
_MOST = 1e12  # the loss of an option in HiGHS; a bound that counts a larger one as this is still a bound
_ROW_SCALE = 1e3  # the room of a limit in HiGHS: its 1e-6 is then a part in 1e9; 1e6 and 1 measure slower
_LEAST_LOSS = 1e-180  # a smaller one counts as this: nobody tells them apart
_SAFETY = 1e-9  # relative; well above the rounding error of a sum of 20000 float64 terms
_LEAST_STEP = 1e-12  # of a limit's room; a repair that gains less would not end
_ROUNDS = 3  # of pricing and leaving out; the third seldom finds anything


@dataclass(frozen=True, slots=True)
class Table:
    """Options as columns; the options of an item are neighbours."""

    item: Ints  # (n,) the item, rising from 0
    loss: Floats  # (n,)
    costs: Ints  # (n_limits, n) bytes
    index: Ints  # (n,) the option's place within its item, as given

    @property
    def starts(self) -> Ints:
        """(n_items,) the first option of each item."""
        return np.flatnonzero(np.diff(self.item, prepend=-1))

    def where(self, keep: npt.NDArray[np.bool_]) -> Table:
        """The options where `keep` is true; every item has one left."""
        return Table(self.item[keep], self.loss[keep], self.costs[:, keep], self.index[keep])


@dataclass(frozen=True, slots=True)
class Answer:
    """The option of each item, a proven lower bound of the loss, and how the search ended.

    Where no choice was found, the bound is infinite if it is proven that there is none.
    """

    picked: tuple[int, ...] | None  # None: no choice found
    bound: float
    how: str
    prices: tuple[float, ...] = ()  # value of a unit of each limit's room, by the last relaxation


def choose(
    losses: Sequence[Sequence[float]],
    costs: Sequence[Sequence[Sequence[int]]],
    room: Sequence[int],
    time_limit: float,
    rel_gap: float,
) -> Answer:
    """Choose the best option of each item.

    losses[i][j] and costs[i][j][k]: of option j of item i, the latter in bytes of limit k; room[k] bytes.
    The search ends after `time_limit` seconds, or within `rel_gap` of the loss above every item's least; the answer is
    then the best choice found and the bound that was proven.
    """
    deadline = time.monotonic() + time_limit
    table = _table(losses, costs, len(room))
    limits = np.array(room, np.int64)
    best, lower, upper, prices = None, -math.inf, math.inf, np.zeros(len(room))
    for _ in range(_ROUNDS):
        relaxed = _relax(table, limits, upper)
        if relaxed is None:
            return Answer(None, math.inf, "the linear relaxation has no solution")
        if relaxed.bound > lower:
            lower, prices = relaxed.bound, relaxed.prices
        for start in _starts(table, relaxed, limits):
            found = _improve(table, _repair(table, start, limits), limits)
            if found is not None and (total := math.fsum(table.loss[found])) < upper:
                best, upper = tuple(table.index[found].tolist()), total
        keep = (relaxed.priced == 0) | (relaxed.bound + relaxed.priced <= upper * (1 + _SAFETY))
        if keep.all():
            break
        table = table.where(keep)
    known = Answer(best, min(lower, upper), f"optimal to {rel_gap:g} by the linear bound", tuple(prices.tolist()))
    if best is not None and upper - lower <= rel_gap * (upper - _excess(table)[1]):
        return known
    return _finish(table, limits, known, upper, (deadline - time.monotonic(), rel_gap))


def _table(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[int]]], n_limits: int) -> Table:
    sizes = [len(options) for options in losses]
    return Table(
        np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        np.array([x for options in losses for x in options], np.float64),
        np.array([x for options in costs for x in options], np.int64).reshape(sum(sizes), n_limits).T,
        np.concatenate([np.arange(n, dtype=np.int64) for n in sizes]),
    )


def _excess(table: Table) -> tuple[Floats, float]:
    """(n,) loss above the item's least, and the sum of the least."""
    least = np.minimum.reduceat(table.loss, table.starts)
    return table.loss - least[table.item], math.fsum(least)


def _rows(table: Table, limits: Ints) -> tuple[Floats, Floats]:
    """Costs above the item's least (n_limits, n) and the room for them (n_limits,), in units of room / 1000."""
    least = np.minimum.reduceat(table.costs, table.starts, axis=1)
    costs, room, unit = table.costs - least[:, table.item], limits - least.sum(axis=1), _units(table, limits)
    return costs / unit[:, None], room / unit


def _units(table: Table, limits: Ints) -> Floats:
    """(n_limits,) a thousandth of each limit's room above every item's least cost."""
    room = limits - np.minimum.reduceat(table.costs, table.starts, axis=1).sum(axis=1)
    return np.asarray(np.maximum(room, 1) / _ROW_SCALE)


@dataclass(frozen=True, slots=True)
class _Relaxation:
    """A solved linear relaxation.

    priced: (n,) cost of each option above its item's best at the prices. bound: proven by the prices. prices: of a unit
    of each limit. taken: (n,) how much of each option is taken.
    """

    priced: Floats
    bound: float
    prices: Floats
    taken: Floats


def _relax(table: Table, limits: Ints, upper: float) -> _Relaxation | None:
    """Solve the relaxation; None where it has no solution.

    Any prices give a bound, so the tolerances of HiGHS can make it weaker, never wrong.
    """
    excess, base = _excess(table)
    scale = _scale(excess, upper - base)
    costs, room = _rows(table, limits)
    found = highs.solve_relaxation(np.minimum(excess * scale, _MOST), costs, room, table.item)
    if found.ended == "infeasible":
        return None
    prices = np.maximum(-found.duals, 0.0) / scale
    priced = excess + prices @ costs
    least = np.minimum.reduceat(priced, table.starts)
    return _Relaxation(
        priced - least[table.item],
        math.fsum([base, *least, *(-prices * room)]),
        prices / _units(table, limits),
        np.zeros(len(excess)) if found.taken is None else found.taken,
    )


def _starts(table: Table, relaxed: _Relaxation, limits: Ints) -> Iterator[Ints]:
    """Yield choices to start from.

    The best at the prices; the options that the relaxation takes most of; of those it takes a part of, the cheapest.
    """
    yield _first_least(table, relaxed.priced)
    yield _first_least(table, -relaxed.taken)
    costs, _ = _rows(table, limits)
    yield _first_least(table, np.where(relaxed.taken > 1e-6, costs.max(axis=0), np.inf))


def _scale(excess: Floats, known: float) -> float:
    """The factor that makes the excess of the best known choice _SCALE, within the range of floats."""
    size = known if 0 < known < math.inf else float(excess.max(initial=0.0))
    return _SCALE / max(size, _LEAST_LOSS) if size > 0 else 1.0


def _first_least(table: Table, values: Floats) -> Ints:
    """(n_items,) the first option of least value in each item."""
    order = np.lexsort((np.arange(len(values)), values, table.item))
    return order[table.starts]


def _repair(table: Table, picked: Ints, limits: Ints) -> Ints | None:
    """Change `picked` step by step until it is within the limits; None where that fails.

    Every step lowers the excess over all limits, each as a share of its room, at the least loss per share.
    """
    picked = picked.copy()
    room = (_units(table, limits) * _ROW_SCALE)[:, None]
    while True:
        over = (table.costs[:, picked].sum(axis=1) - limits)[:, None]
        if (over <= 0).all():
            return picked
        now = picked[table.item]
        after = over + table.costs - table.costs[:, now]
        saved = ((np.maximum(over, 0) - np.maximum(after, 0)) / room).sum(axis=0)
        worth = saved > _LEAST_STEP
        if not worth.any():
            return None
        ratio = np.full(len(saved), np.inf)
        np.divide(table.loss - table.loss[now], saved, out=ratio, where=worth)
        step = int(ratio.argmin())
        picked[table.item[step]] = step


def _improve(table: Table, picked: Ints | None, limits: Ints) -> Ints | None:
    """Make every single change to `picked` that lowers the loss and fits, the largest gain first."""
    if picked is None:
        return None
    picked = picked.copy()
    while True:
        now = picked[table.item]
        left = limits - table.costs[:, picked].sum(axis=1)
        fits = (table.costs - table.costs[:, now] <= left[:, None]).all(axis=0)
        gain = np.where(fits, table.loss[now] - table.loss, 0.0)
        step = int(gain.argmax())
        if gain[step] <= 0:
            return picked
        picked[table.item[step]] = step


def _finish(table: Table, limits: Ints, known: Answer, upper: float, stop: tuple[float, float]) -> Answer:
    """Solve the rest by branch and cut until `stop`, seconds or gap; `known` has the loss `upper`."""
    best, lower = known.picked, known.bound
    excess, base = _excess(table)
    scale = _scale(excess, upper - base)
    costs, room = _rows(table, limits)
    values = np.minimum(excess * scale, _MOST)
    end = highs.solve_choice(values, costs, room, table.item, (max(stop[0], 0.01), stop[1]))
    if end.taken is not None:
        found = _improve(table, _repair(table, _first_least(table, -np.round(end.taken, 3)), limits), limits)
        if found is not None and (total := math.fsum(table.loss[found])) < upper:
            best, upper = tuple(table.index[found].tolist()), total
    if math.isfinite(end.bound):
        # options left out cost more than the upper bound at that time, so the bound of the rest holds up to it
        lower = max(lower, min(base + end.bound / scale, upper))
    if end.ended == "infeasible" and best is None:
        return Answer(None, math.inf, "infeasible")
    how = {"optimal": f"optimal to {stop[1]:g} by HiGHS", "time": "stopped by the time limit"}
    return Answer(best, min(lower, upper), how.get(end.ended, "HiGHS failed, the linear bound holds"), known.prices)
