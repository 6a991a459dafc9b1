"""Results of a conversion and of a verification, as text."""

from __future__ import annotations

from statistics import median

from requant.common.units import format_size
from requant.conversion.record import Conversion, Converted
from requant.conversion.verify import Verification
from requant.errors import FILE_NAME, brief, printable
from requant.formats import by_bits
from requant.report.figures import percent


def conversion_text(made: Conversion, *, verified: bool) -> str:
    """Return the measured errors of each type, the size, and whether the output was verified."""
    state = f"verified, {len(made.tensors)} tensors read again" if verified else "not verified"
    weighted = f", weighted by {brief(made.imatrix, FILE_NAME)}" if made.imatrix else ""
    errors = _error_lines([t for t in made.tensors if t.type != t.source_type])
    measured = f"relative error of the weights (root mean square), measured{weighted}"
    head = measured if errors else "every tensor is a copy"
    written = f"{printable(str(made.output))}: {format_size(made.size)}, {made.plan.bpw:.3f} bits per weight, {state}"
    return "\n".join([head, *errors, "", written])


def _error_lines(encoded: list[Converted]) -> list[str]:
    """Return a line for each type, by bits: tensors, median error, largest error and its tensor."""
    lines = []
    for name in sorted({t.type for t in encoded}, key=by_bits):
        found = [t for t in encoded if t.type == name]
        worst = max(found, key=lambda t: t.rmse)
        middle = f"median {percent(median(t.rmse for t in found), '5.2f')}"
        largest = f"largest {percent(worst.rmse, '5.2f')} {brief(worst.name)}"
        lines.append(f"{name:8}{len(found):4} tensor{' ' if len(found) == 1 else 's'}  {middle}  {largest}")
    return lines


def verification_text(result: Verification) -> str:
    """Return a line for the bytes read, and one for each finding."""
    against = f", against its {' and '.join(result.against)}" if result.against else ""
    read = f"{printable(str(result.output))}: {result.n_tensors} tensors, {format_size(result.n_bytes)} read{against}"
    state = "sound" if result.ok else "not compared with the source" if result.is_itself_sound else "not sound"
    return "\n".join([f"{read}: {state}", *(printable(line) for line in result.findings)])
