"""Summary of a batch as a table in text."""

from __future__ import annotations

from collections.abc import Sequence

from requant.api.batch.summary import Row
from requant.common.units import format_size
from requant.errors import printable
from requant.report.text.grid import grid

_LOSS = "loss: predicted, in nats per token; of plans scored without gradients in points of their own"


def batch_table(rows: Sequence[Row]) -> str:
    """Return a line for each output, then the failures."""
    table = [["source", "budget", "output", "size", "bits/weight", "loss", ""]]
    for row in rows:
        table.append(
            [
                printable(row.source),
                row.budget,
                printable(row.output or "-"),
                "-" if row.size is None else format_size(row.size),
                "-" if row.bpw is None else f"{row.bpw:.3f}",
                "-" if row.predicted_loss is None else f"{row.predicted_loss:.4g}",
                row.status if not row.exit_code else f"{row.status} ({row.exit_code})",
            ]
        )
    failed = [f"{printable(row.output or row.source)}: {row.error}" for row in rows if row.error]
    legend = ["", _LOSS] if any(row.predicted_loss is not None for row in rows) else []
    return "\n".join([*grid(table, right=(3, 4, 5)), *legend, *([""] if failed else []), *failed])
