"""Evaluation: perplexity of a model, and the KL divergence of its next-token distribution from a base model's.

As in llama-perplexity, windows of the text see nothing of each other, the second half of each is scored, and the first
token is replaced by BOS where the tokenizer adds one. Activations are F32 here; llama.cpp rounds them to 8 bits in
front of every quantized matrix, which adds about 0.0004 nats to its divergences. Both models are run layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from requant.common.notebook import html
from requant.common.serialization import dump, parse, parse_record, read_text, to_plain
from requant.common.threads import for_each
from requant.errors import BadInput
from requant.model.forward.passes import (
    EMBEDDING,
    Head,
    RunnableModel,
    Tokens,
    check_tokens,
    forward,
    log_probabilities,
    read_head,
)
from requant.model.forward.tape import Node

if TYPE_CHECKING:
    from requant.container.source import Source
    from requant.model.forward.tape import Array

EVALUATION_SCHEMA = "requant.evaluation/1"

Floats64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures over the `n_scored` tokens of `n_windows` windows of `n_ctx`; logarithms are natural.

    The divergences are None without a base: of the base's distribution p from the model's q, mean sum p ln(p/q) with
    its standard error, and the 99 and 99.9 % quantiles over tokens. same_top: share of tokens for which both models
    hold the same one to be likeliest. ppl_error and kld_error are standard errors over tokens. engine: what ran the
    models, None for requant itself.
    """

    n_windows: int
    n_ctx: int
    n_scored: int
    ppl: float
    ppl_error: float
    base_ppl: float | None = None
    mean_kld: float | None = None
    kld_error: float | None = None
    p99_kld: float | None = None
    p999_kld: float | None = None
    same_top: float | None = None
    model: str | None = None  # file names, no folders
    header_sha256: str | None = None  # of the model's header: which file was measured
    base: str | None = None
    text: str | None = None
    engine: str | None = None

    def _repr_html_(self) -> str:
        return html(self)

    def to_json(self) -> str:
        """Return one JSON object, the figures by their names."""
        return dump({"schema": EVALUATION_SCHEMA} | to_plain(self))

    @classmethod
    def from_json(cls, text: str, path: object = "evaluation.json") -> Evaluation:
        """Return the evaluation in `text`. Raise BadInput that names `path`."""
        found: Evaluation = parse_record(cls, parse(text, EVALUATION_SCHEMA, path), "", path)
        return found


def read_evaluation(path: Path | str) -> Evaluation:
    """Return the evaluation in the file at `path`. Raise BadInput, InputOutputError."""
    return Evaluation.from_json(read_text(path), path)


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """Per scored token: its log-likelihood; with a base also the base's, the divergence, and whether tops agree."""

    log_likelihood: Floats64
    base_log_likelihood: Floats64 | None = None
    kld: Floats64 | None = None
    same_top: NDArray[np.bool_] | None = None


def evaluate(
    model: RunnableModel,
    tokens: Tokens,
    *,
    base: RunnableModel | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Return the figures of `model` on windows of `tokens` (n_windows, n_ctx), and its divergence from `base`.

    `progress` is called with layers done, the heads counted as one. Raises BadInput where base and model have different
    vocabularies, NumericFault for activations that are not finite.
    """
    if base is not None:
        check_base(model.weights.source, base.weights.source)
    check_tokens(model, tokens)
    models = [m for m in (model, base) if m is not None]
    streams = [forward(m, tokens, threads=threads, on_layer=lambda _: progress(1)) for m in models]
    reference = None if base is None else (read_head(base), streams[1])
    judged = judge(read_head(model), streams[0], tokens, reference, threads)
    progress(1)
    return summary(judged, tokens)


def check_base(own: Source, other: Source) -> None:
    """Raise BadInput unless a model and its base give logits over the same vocabulary."""
    n, n_base = (source.tensor(EMBEDDING).n_rows for source in (own, other))
    if n != n_base:
        raise BadInput(other.path, "the base has another vocabulary", got=f"{n_base} tokens", limit=f"{n} of the model")
    key = "tokenizer.ggml.tokens"
    vocabularies = [source.metadata.values[key].raw for source in (own, other) if key in source.metadata.values]
    if len({bytes(v) for v in vocabularies}) > 1:
        raise BadInput(other.path, "the base has another vocabulary", got=f"other strings in '{key}'")


def judge(
    head: Head, x: Array, tokens: Tokens, base: tuple[Head, Array] | None = None, threads: int | None = None
) -> TokenFigures:
    """Return the figures of the scored tokens of `x`, the stream behind the last layer; base: its head and stream."""
    n_ctx = tokens.shape[1]
    positions = np.arange(n_ctx // 2, n_ctx - 1)
    flat, targets = _select(x, positions), tokens[:, positions + 1].reshape(-1)
    n, parts = len(flat), head.parts(len(flat))
    likelihood, base_likelihood, kld, same = np.empty(n), np.empty(n), np.empty(n), np.empty(n, bool)
    others = None if base is None else (base[0], _select(base[1], positions))

    def work(index: int) -> None:
        part = parts[index]
        rows = np.arange(part.stop - part.start)
        q = _log_probabilities(head, flat[part])
        likelihood[part] = q[rows, targets[part]]
        if others is not None:
            p = _log_probabilities(others[0], others[1][part])
            base_likelihood[part] = p[rows, targets[part]]
            same[part] = p.argmax(axis=1) == q.argmax(axis=1)
            np.subtract(p, q, out=q)
            kld[part] = np.einsum("ij,ij->i", np.exp(p, out=p), q, dtype=np.float64)

    for_each(work, len(parts), threads)
    return TokenFigures(likelihood) if base is None else TokenFigures(likelihood, base_likelihood, kld, same)


def summary(judged: TokenFigures, tokens: Tokens) -> Evaluation:
    """Return the figures over all scored tokens."""
    n = len(judged.log_likelihood)
    ppl = float(np.exp(-judged.log_likelihood.mean()))
    error = ppl * float(judged.log_likelihood.std(ddof=1)) / n**0.5
    plain = Evaluation(tokens.shape[0], tokens.shape[1], n, ppl, error)
    if judged.kld is None or judged.base_log_likelihood is None or judged.same_top is None:
        return plain
    p99, p999 = np.quantile(judged.kld, [0.99, 0.999])
    return replace(
        plain,
        base_ppl=float(np.exp(-judged.base_log_likelihood.mean())),
        mean_kld=float(judged.kld.mean()),
        kld_error=float(judged.kld.std(ddof=1)) / n**0.5,
        p99_kld=float(p99),
        p999_kld=float(p999),
        same_top=float(judged.same_top.mean()),
    )


def _select(x: Array, positions: NDArray[np.intp]) -> Array:
    return np.ascontiguousarray(x[:, positions]).reshape(-1, x.shape[-1])


def _log_probabilities(head: Head, x: Array) -> Array:
    return log_probabilities(head.logits(head.normalize(Node(x)).value)[0])[0]
