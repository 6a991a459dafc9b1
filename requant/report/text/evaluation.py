"""Evaluations and statistics as text."""

from __future__ import annotations

from pathlib import Path

from requant.container.source import Source
from requant.errors import printable
from requant.report.figures import percent
from requant.scoring.evaluate import Evaluation
from requant.scoring.statistics import Statistics

FEW_TOKENS = 64  # of an expert; statistics of fewer are hardly better than none


def evaluation_text(e: Evaluation, model: Path, base: Path | None) -> str:
    """Return perplexity and, with a base, divergence."""
    lines = [
        f"{printable(str(model))}: {e.n_scored} tokens scored in {e.n_windows} windows of {e.n_ctx} tokens",
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
    matrices = ((t, range(t.shape[2] if len(t.shape) > 2 else 1)) for t in source.tensors if t.name in names)
    counts = [experts.get((t.name, m), 0) for t, numbers in matrices for m in numbers]
    few = [count for count in counts if count < FEW_TOKENS]
    if not few:
        return head
    seen = f"{len(few)} of {len(counts)}, {few.count(0)} of them none"
    return f"{head}\nexperts that saw under {FEW_TOKENS} tokens: {seen}; more --windows would cover them"
