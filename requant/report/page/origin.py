"""The page's sections on running and checking an output, its origin and its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from requant.errors import FILE_NAME, REMARK
from requant.model.kinds import LANGUAGE_MODEL
from requant.planning.engines import engine_named
from requant.report import shell
from requant.report.figures import percent, reason_lines
from requant.report.html import escape, head_cells, number_cell, table, tag, text
from requant.report.start_command import kind_of_plan, start_command

if TYPE_CHECKING:
    from requant.conversion.record import Conversion
    from requant.planning.plan import Plan
    from requant.scoring.evaluate import Evaluation

_EVALUATION_HEADS = (
    *("text", "predicted KL", "measured KL", "measured over predicted", "99 %", "same top", "perplexity"),
    *("of the base", "tokens"),
)
_NAMED = 4  # most tensors named beside a reason that they share


def run_section(plan: Plan, made: Conversion | None) -> str:
    """Return the engine's command line, then commands of requant, each to be copied."""
    out = Path("OUT.gguf" if made is None else made.output.name)
    engine = engine_named(plan.runtime.get("engine"))
    what = "Modelfile for" if engine.family == "ollama" else "start"
    blocks = [(f"{what} {engine.name or engine.family}", start_command(plan, out))]
    source = shell.file_argument(plan.source)
    if made is None:
        commands = {"convert": ["convert", source, str(out), "--plan", "PLAN.json"]}
    else:
        name = shell.file_argument(out)
        commands = {"verify: every byte, against record and source": ["verify", name, "--source", source]}
        if kind_of_plan(plan) is LANGUAGE_MODEL:
            words = ["evaluate", name, "--base", source, "--text", "TEXT.txt"]
            commands["evaluate: perplexity and KL divergence"] = words
    blocks += ((label, shell.join_words(["requant", *words])) for label, words in commands.items())
    return "".join(_copy_block(label, line) for label, line in blocks)


def _copy_block(label: str, line: str) -> str:
    code = tag("pre", tag("code", escape(line)), tabindex="0")
    button = tag("button", "copy", type="button", class_="copy", hidden=True, aria_label=f"copy: {label}")
    return tag("figure", tag("figcaption", text(label)), tag("div", code, button, class_="code"))


def origin_section(plan: Plan, made: Conversion | None, source_sha256: str | None, output_sha256: str | None) -> str:
    """Return names and hashes, notes, reasons of tensors and types left out, anomalies."""
    facts = {
        "source": plan.source,
        "architecture": plan.arch,
        "source, SHA-256 of its header": plan.header_sha256,
        "source, SHA-256": source_sha256,
        **({} if made is None else _output_facts(made, output_sha256)),
        "plan, SHA-256": plan.sha256(),
        "method": plan.method,
        "solver": plan.solver,
        "effort of the encoders": plan.effort.name.lower(),
        "rounding": None if plan.compensation is None else f"compensated, {plan.compensation}",
    }
    rows = (
        tag("div", tag("dt", label), tag("dd", text(value, REMARK if label == "solver" else FILE_NAME)))
        for label, value in facts.items()
        if value
    )
    return tag("dl", *rows, class_="facts") + "".join(
        tag("h3", label) + tag("ul", *(tag("li", text(line, REMARK)) for line in lines), class_="notes")
        for label, lines in _remarks(plan, made).items()
        if lines
    )


def _output_facts(made: Conversion, output_sha256: str | None) -> dict[str, str | None]:
    return {
        "output": made.output.name,
        "output, size": f"{made.size:,} bytes",
        "output, SHA-256 of its header": made.header_sha256,
        "output, SHA-256": output_sha256,
        "importance": made.imatrix or "none",
        "importance, SHA-256": made.imatrix_sha256,
        "requant": made.version,
    }


def _remarks(plan: Plan, made: Conversion | None) -> dict[str, list[str]]:
    odd = [] if made is None else [line for t in made.tensors if t.odd is not None for line in t.odd.notes(t.name)]
    notes = [*plan.notes, *(() if made is None else made.notes)]
    stayed = reason_lines(((c.reason, c.name) for c in plan.choices if c.reason), _NAMED)
    left_out = reason_lines(((note, c.name) for c in plan.choices for note in c.notes), _NAMED)
    return {"Notes": notes, "Stayed as they are": stayed, "Types left out": left_out, "Odd numbers": odd}


def evaluation_section(plan: Plan, made: Conversion | None, evaluations: Sequence[Evaluation]) -> str:
    """Return predicted and measured KL, a row for each evaluation."""
    if not evaluations:
        if (kind := kind_of_plan(plan)) is not LANGUAGE_MODEL:
            return tag("p", f"The divergence is not measured: the file is {kind.words}.", class_="hint")
        how = tag("code", "requant evaluate --json")
        hint = f"The divergence was not measured; {how} does it, and the report takes what that prints."
        return tag("p", hint, class_="hint")
    rows = (tag("tr", *_evaluation_cells(plan, made, evaluation)) for evaluation in evaluations)
    figures = table(head_cells(_EVALUATION_HEADS, range(1, len(_EVALUATION_HEADS))), rows, class_="data")
    return tag("h3", "Divergence from the source, nats per token") + tag("div", figures, class_="scroll")


def may_measure(evaluation: Evaluation, made: Conversion | None) -> bool:
    """Return whether the evaluation may be of this output: its file is unknown or has the same header."""
    return made is None or evaluation.header_sha256 in (None, made.header_sha256)


def _evaluation_cells(plan: Plan, made: Conversion | None, evaluation: Evaluation) -> list[str]:
    predicted, kld = plan.predicted_kl, evaluation.mean_kld
    if not may_measure(evaluation, made):
        predicted = None
    cells = [
        f"{predicted:.4g}" if predicted is not None else "none" if plan.is_copy else "?",
        "" if kld is None else f"{kld:.4g} &plusmn; {evaluation.kld_error or 0:.1g}",
        f"{kld / predicted:.2f}" if kld is not None and predicted else "",
        "" if evaluation.p99_kld is None else f"{evaluation.p99_kld:.3g}",
        "" if evaluation.same_top is None else percent(evaluation.same_top, ".2f"),
        f"{evaluation.ppl:.4f} &plusmn; {evaluation.ppl_error:.2g}",
        "" if evaluation.base_ppl is None else f"{evaluation.base_ppl:.4f}",
        f"{evaluation.n_scored:,}",
    ]
    other = "" if may_measure(evaluation, made) else f" (of another file, {text(evaluation.model or '?', FILE_NAME)})"
    by = f", run by {text(evaluation.engine, FILE_NAME)}" if evaluation.engine else ""
    name = tag("th", text(evaluation.text or "?", FILE_NAME), by, other, scope="row")
    return [name, *map(number_cell, cells)]
