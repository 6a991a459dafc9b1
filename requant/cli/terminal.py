"""The abilities of stdout: pictures on a terminal, colours unless refused, block characters if its encoding has them.

NO_COLOR and TERM=dumb take the colours away; FORCE_COLOR and CLICOLOR_FORCE draw, in colour, into pipes and files too.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from requant.report.text.grid import WIDTH

if TYPE_CHECKING:
    from requant.model.inspection import Inspection
    from requant.planning.plan import Plan
    from requant.report.text.bars import Canvas, Drawing

_WIDEST = 120  # columns


def draws_pictures() -> bool:
    """Return whether pictures are drawn: on a terminal, or if colours are forced."""
    return _is_terminal() or _colours_forced()


def width() -> int:
    """Return the most columns of a table: those of the picture, if one is drawn."""
    return max(40, _columns()) if draws_pictures() else WIDTH


def plan_parts(plan: Plan) -> tuple[str | Drawing, ...]:
    """Return the picture of the plan, if one is drawn, and its tables."""
    from requant.report.text.table import plan_table

    table = plan_table(plan, width())
    if not draws_pictures():
        return (table,)
    from requant.report.text.bars import plan_bars

    return plan_bars(plan, _canvas()), table


def model_picture(model: Inspection) -> tuple[Drawing, ...]:
    """Return the picture of the model, () if none is drawn."""
    if not draws_pictures():
        return ()
    from requant.report.text.bars import model_bars

    return (model_bars(model, _canvas()),)


def _canvas() -> Canvas:
    from requant.report.text.bars import FULL, Canvas

    colours = not os.environ.get("NO_COLOR") and (_colours_forced() or os.environ.get("TERM") != "dumb")
    try:
        FULL.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return Canvas(_columns(), colours, False)
    return Canvas(_columns(), colours, True)


def _colours_forced() -> bool:
    return any(os.environ.get(name, "") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE"))


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _columns() -> int:
    return min(shutil.get_terminal_size((WIDTH if not _is_terminal() else 80, 24)).columns, _WIDEST)
