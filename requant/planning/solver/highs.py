"""HiGHS: a multiple-choice knapsack, or its linear relaxation, as a model of that solver, and its answer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import highspy
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FEASIBLE = 2  # kSolutionStatusFeasible in HConst.h
_STDOUT = threading.Lock()

Ended = Literal["optimal", "infeasible", "time", "failed"]


@dataclass(frozen=True, slots=True)
class HighsResult:
    """The answer of HiGHS.

    taken: (n,) how much of each option, None where it found no choice. duals: (n_limits,) of a relaxation's limits, 0
    where it has none. bound: a proven lower bound of the least value of whole options. ended: how the search ended.
    """

    taken: Floats | None
    duals: Floats
    bound: float
    ended: Ended


def solve_relaxation(values: Floats, costs: Floats, room: Floats, item: Ints) -> HighsResult:
    """Minimize the sum of values (n,) over parts of options that add up to one per item (n,).

    Their costs (n_limits, n) stay within the room (n_limits,).
    """
    return _run(_build_model(values, costs, room, item), len(room), {})


def solve_choice(values: Floats, costs: Floats, room: Floats, item: Ints, stop: tuple[float, float]) -> HighsResult:
    """Minimize the same sum over whole options; end the search at `stop`, seconds or relative gap."""
    problem = _build_model(values, costs, room, item)
    problem.integrality_ = [highspy.HighsVarType.kInteger] * len(values)
    problem.col_upper_ = np.ones(len(values))
    return _run(problem, len(room), {"time_limit": stop[0], "mip_rel_gap": stop[1]})


def _build_model(values: Floats, costs: Floats, room: Floats, item: Ints) -> highspy.HighsLp:
    """Build the model: a column per option, with its costs and then a one in its item's row."""
    n, n_limits, n_items = len(values), len(room), int(item[-1]) + 1
    problem = highspy.HighsLp()
    problem.num_col_, problem.num_row_ = n, n_limits + n_items
    problem.col_cost_ = values
    problem.col_lower_, problem.col_upper_ = np.zeros(n), np.full(n, highspy.kHighsInf)
    problem.row_lower_ = np.r_[np.full(n_limits, -highspy.kHighsInf), np.ones(n_items)]
    problem.row_upper_ = np.r_[room, np.ones(n_items)]
    rows = np.broadcast_to(np.arange(n_limits), (n, n_limits))
    matrix = problem.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = np.arange(n + 1) * (n_limits + 1)
    matrix.index_ = np.column_stack([rows, n_limits + item]).ravel()
    matrix.value_ = np.column_stack([costs.T, np.ones(n)]).ravel()
    return problem


def _run(problem: highspy.HighsLp, n_limits: int, options: dict[str, float]) -> HighsResult:
    with _silence_stdout():
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("parallel", "off")  # the same on any number of cores
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(problem)
        solver.run()
    info, found, ended = solver.getInfo(), solver.getSolution(), _read_status(solver.getModelStatus())
    dual = ended == "optimal" and not problem.integrality_
    return HighsResult(
        taken=np.asarray(found.col_value) if info.primal_solution_status == _FEASIBLE else None,
        duals=np.asarray(found.row_dual)[:n_limits] if dual else np.zeros(n_limits),
        bound=info.mip_dual_bound,
        ended=ended,
    )


def _read_status(status: highspy.HighsModelStatus) -> Ended:
    of = highspy.HighsModelStatus
    if status in (of.kInfeasible, of.kUnboundedOrInfeasible):  # values of choices are never unbounded
        return "infeasible"
    return "optimal" if status == of.kOptimal else "time" if status == of.kTimeLimit else "failed"


@contextlib.contextmanager
def _silence_stdout() -> Iterator[None]:
    """Keep the process's stdout silent inside, where one thread is at a time.

    With its output off HiGHS 1.12 prints `transformNewIntegerFeasibleSolution tmpSolver.run();` (HiGHS.jl issue 312)
    and 1.16 its banner, from C, amid the JSON that is the command's result.
    """
    c_library = ctypes.CDLL("ucrtbase" if os.name == "nt" else None)
    with _STDOUT:
        try:
            c_library.fflush(None)
            saved = os.dup(1)
        except OSError:  # there is no stdout
            yield
            return
        try:
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                yield
        finally:
            c_library.fflush(None)  # what C still buffers is dropped too
            os.dup2(saved, 1)
            os.close(saved)
