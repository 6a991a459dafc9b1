"""Results of a conversion, a verification, an evaluation and a calibration, as text."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from requant.common.units import format_size
from requant.conversion.verification import PLAUSIBLE, READABLE, SAME, WRONG
from requant.errors import FILE_NAME, brief, printable
from requant.formats import by_bits
from requant.report.figures import describe_compensation, percent

if TYPE_CHECKING:
    from requant.container.source import Source
    from requant.conversion.record import Conversion, Converted
    from requant.conversion.verification import Verification
    from requant.scoring.evaluate import Evaluation
    from requant.scoring.statistics import Statistics

VERDICTS = {
    SAME: "the same bytes as were written",
    PLAUSIBLE: "plausible against the source",
    READABLE: "readable; compared with nothing",
    WRONG: "verification failed",
}
FEW_TOKENS = 64  # of an expert; statistics of fewer are hardly better than none


def conversion_text(made: Conversion, *, verified: bool) -> str:
    """Return the measured errors of each type, the size, and whether the output was verified."""
    state = f"verified, {len(made.tensors)} tensors read again" if verified else "not verified"
    weighted = f", weighted by {brief(made.imatrix, FILE_NAME)}" if made.imatrix else ""
    errors = _error_lines([t for t in made.tensors if t.type != t.source_type])
    measured = f"relative error of the weights (root mean square), measured{weighted}"
    head = measured if errors else "every tensor is a copy"
    written = f"{printable(str(made.output))}: {format_size(made.size)}, {made.plan.bpw:.3f} bits per weight, {state}"
    compensated = [] if made.plan.compensation is None else [describe_compensation(made)]
    return "\n".join([head, *errors, *compensated, "", written])


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
    """Return the verdict, a line for each thing that was compared, and one for each finding."""
    read = f"{printable(str(result.output))}: {result.n_tensors} tensors, {format_size(result.n_bytes)} read"
    lines = [f"{read}: {VERDICTS[result.verdict]}", *(f"  {line}" for line in result.compared), *result.findings]
    return "\n".join(map(printable, lines))


def evaluation_text(e: Evaluation, model: Path, base: Path | None) -> str:
    """Return perplexity and, with a base, divergence."""
    lines = [
        f"{printable(str(model))}: {e.n_scored} tokens scored in {e.n_windows} windows of {e.n_ctx} tokens",
        *([] if e.engine is None else [f"run by {printable(e.engine)}"]),
        f"perplexity      {e.ppl:.4f} \u00b1 {e.ppl_error:.4f} (one standard error)",
    ]
    if e.mean_kld is not None:
        lines += [
            f"of the base     {e.base_ppl:.4f} ({printable(str(base))})",
            f"KL divergence   {e.mean_kld:.6f} \u00b1 {e.kld_error:.6f} nats",
            f"  99 %          {e.p99_kld:.6f} nats",
            f"  99.9 %        {e.p999_kld:.6f} nats",
            f"same top token  {percent(e.same_top or 0, '.3f')}",
        ]
    return "\n".join(lines)


def statistics_text(stats: Statistics, source: Source, out: Path) -> str:
    """Return the tokens and tensors of the statistics, and the number of experts with few tokens."""
    experts = {key: sums.count for key, sums in stats.matrices.items() if key[1] is not None}
    names = {name for name, _ in experts}
    tensors = f"{len({name for name, _ in stats.matrices})} tensors over {stats.n_tokens} tokens"
    head = f"{printable(str(out))}: {tensors} in windows of {stats.n_ctx} tokens"
    if stats.engine is not None:
        head += f"\nrun by {printable(stats.engine)}, without gradients; pass it with --imatrix"
    matrices = ((t, range(t.shape[2] if len(t.shape) > 2 else 1)) for t in source.tensors if t.name in names)
    counts = [experts.get((t.name, m), 0) for t, numbers in matrices for m in numbers]
    few = [count for count in counts if count < FEW_TOKENS]
    if not few:
        return head
    seen = f"{len(few)} of {len(counts)}, {few.count(0)} of them none"
    return f"{head}\nexperts that saw under {FEW_TOKENS} tokens: {seen}; more --windows would cover them"
