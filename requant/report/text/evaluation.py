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
    lines = [
        f"{printable(str(out))}: {len({name for name, _ in stats.matrices})} tensors over {stats.n_tokens} tokens "
        f"in windows of {stats.n_ctx} tokens"
    ]
    wanted = [
        (t.name, m)
        for t in source.tensors
        if t.name in {name for name, _ in experts}
        for m in range(t.shape[2] if len(t.shape) > 2 else 1)
    ]
    few = [key for key in wanted if experts.get(key, 0) < FEW_TOKENS]
    if few:
        unseen = sum(experts.get(key, 0) == 0 for key in few)
        lines.append(
            f"experts that saw under {FEW_TOKENS} tokens: {len(few)} of {len(wanted)}, {unseen} of them none; "
            "more --windows would cover them"
        )
    return "\n".join(lines)
