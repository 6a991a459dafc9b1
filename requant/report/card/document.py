"""A model card for outputs of requant: YAML front matter and tables, as the Hugging Face Hub shows a README.md.

All of it comes from records, metadata and evaluations; a figure that was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from requant.container.hashing import FileHash
from requant.conversion.record import Conversion
from requant.errors import FILE_NAME
from requant.planning.plan import Plan
from requant.report.card import markdown as md
from requant.report.card.origin import CardOverrides, ModelOrigin, override_origin
from requant.report.card.parts import (
    budget_lines,
    describe_budget,
    format_both_units,
    method_lines,
    mixtures_table,
    roles_table,
    type_shares,
)
from requant.report.card.reproduce import reproduction_commands
from requant.report.shell import file_argument, join_words
from requant.report.start_command import start_command
from requant.scoring.evaluate import Evaluation

_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class CardOutput:
    """An output in a model card: its record, the origin in its metadata, its files if they are present.

    source: the files that it was made from, if they are present; evaluation: measured on it.
    """

    made: Conversion
    origin: ModelOrigin
    files: tuple[FileHash, ...] = ()
    source: tuple[FileHash, ...] = ()
    evaluation: Evaluation | None = None

    @property
    def name(self) -> str:
        """Name of its (first) file."""
        return self.made.output.name


def render_card(
    outputs: Sequence[CardOutput], overrides: CardOverrides, pictures: Sequence[str] = (), pages: Sequence[str] = ()
) -> str:
    """Return the card of at least one output; `pictures` and `pages` are files beside it."""
    origins = [override_origin(overrides, origin) for origin in dict.fromkeys(o.origin for o in outputs)]
    source = outputs[0].made.plan.source.removesuffix(".gguf")
    sections = [
        _front_matter(outputs, origins, overrides),
        f"# {', '.join(md.text(origin.name or source, FILE_NAME) for origin in origins)}, GGUF",
        _introduction(outputs, origins),
        *(f"![{md.text(f'{outputs[0].name}: memory, bits and loss')}]({md.address(name)})" for name in pictures),
        *(f"{md.link('Report page', md.address(name))}: every tensor, its candidates and errors." for name in pages),
        "## Files",
        _files_table(outputs, overrides),
        *_measurement_notes(outputs),
        "## Running it",
        *_running_sections(outputs, overrides),
        "## Types",
        *_sections_by_output(outputs, lambda output: [roles_table(output.made.plan)]),
        *_mixtures_sections(outputs),
        "## How it was made",
        *_making_sections(outputs),
        "## Checksums",
        _checksums_table(outputs),
        "## Limits",
        _limits_list(outputs),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def _front_matter(outputs: Sequence[CardOutput], origins: Sequence[ModelOrigin], overrides: CardOverrides) -> str:
    repositories = tuple(dict.fromkeys(name for o in origins for name in o.repositories))
    first, licences = origins[0], {(o.license, o.license_name, o.license_link) for o in origins}
    licence = {"license": first.license, "license_name": first.license_name, "license_link": first.license_link}
    imatrix = ("imatrix",) if any(o.made.imatrix for o in outputs) else ()
    tags = ("gguf", "requant", *imatrix, *(tag for o in origins for tag in o.tags))
    values = {
        "base_model": repositories[0] if len(repositories) == 1 else repositories,
        "base_model_relation": "quantized" if repositories else "",
        "language": tuple(dict.fromkeys(language for o in origins for language in o.languages)),
        "library_name": "gguf",
        **(licence if len(licences) == 1 else {}),
        "pipeline_tag": "text-generation" if all(o.writes_text for o in origins) else "",
        "quantized_by": overrides.quantized_by,
        "tags": tuple(dict.fromkeys(tag for tag in tags if tag != "text-generation")),
    }
    return md.front_matter(values)


def _introduction(outputs: Sequence[CardOutput], origins: Sequence[ModelOrigin]) -> str:
    versions = " and ".join(dict.fromkeys(md.text(o.made.version) for o in outputs))
    sources = ", ".join(dict.fromkeys(md.code(o.made.plan.source, FILE_NAME) for o in outputs))
    of = ", ".join(_hub_link(name) for o in origins for name in o.repositories)
    lines = [f"Quantized{f' from {of}' if of else ''} with requant {versions}; the source is {sources}."]
    authors = dict.fromkeys(md.text(o.author) for o in origins if o.author)
    if authors:
        lines.append(f"The model is by {', '.join(authors)}.")
    parents = dict.fromkeys(_hub_link(name) for o in origins for name in o.parents)
    if parents:
        lines.append(f"It was made from {', '.join(parents)}.")
    if any(o.made.plan.limits and not o.made.plan.is_copy for o in outputs):
        lines.append("Each tensor has the type that the predicted loss of all and the budget gave it.")
    return " ".join(lines)


def _hub_link(repository: str) -> str:
    return md.link(md.text(repository), f"{_HUB}/{repository}")


Column = tuple[str, bool, Callable[[CardOutput], str]]  # head, flush right, cell; '' if unknown


def _output_table(columns: Sequence[Column], outputs: Sequence[CardOutput]) -> str:
    """Return a table without the columns that are unknown for all outputs."""
    cells = [[cell(output) for output in outputs] for _, _, cell in columns]
    filled = [k for k, column in enumerate(cells) if any(column)]
    rows = [[cells[k][i] or "-" for k in filled] for i in range(len(outputs))]
    return md.table([columns[k][0] for k in filled], rows, [i for i, k in enumerate(filled) if columns[k][1]])


def _files_table(outputs: Sequence[CardOutput], overrides: CardOverrides) -> str:
    def link_file(output: CardOutput) -> str:
        name = md.code(output.name, FILE_NAME)
        url = f"{_HUB}/{overrides.repository}/blob/main/{md.address(output.name)}"
        return md.link(name, url) if overrides.repository else name

    columns: list[Column] = [
        ("File", False, link_file),
        ("Made for", False, lambda o: describe_budget(o.made.plan)),
        ("Types, by share of weights", False, lambda o: type_shares(o.made.plan)),
        ("Size", True, lambda o: format_both_units(o.made.size)),
        ("Files", True, lambda o: str(len(o.files)) if len(o.files) > 1 else ""),
        ("Bits per weight", True, lambda o: f"{o.made.plan.bpw:.3f}"),
        ("KL, predicted", True, lambda o: _predicted_kl(o.made.plan)),
        ("Batch (-ub)", True, lambda o: str(o.made.plan.budget.get("ubatch", ""))),
        ("KL, measured", True, lambda o: _measured_figure(o, "mean_kld", ".4g")),
        ("KL, 99 %", True, lambda o: _measured_figure(o, "p99_kld", ".4g")),
        ("Same top token", True, lambda o: _measured_figure(o, "same_top", ".2%").replace("%", " %")),
        ("Perplexity", True, lambda o: _measured_figure(o, "ppl", ".4f")),
        ("of the base", True, lambda o: _measured_figure(o, "base_ppl", ".4f")),
    ]
    return _output_table(columns, outputs)


def _predicted_kl(plan: Plan) -> str:
    return "" if plan.predicted_kl is None else f"{plan.predicted_kl:.4g}"


def _measured_figure(output: CardOutput, name: str, form: str) -> str:
    value = None if output.evaluation is None else getattr(output.evaluation, name)
    return "" if value is None else format(value, form)


def _measurement_notes(outputs: Sequence[CardOutput]) -> list[str]:
    """Return tokens, text and base of the measured figures, once for all outputs that share them."""
    groups: dict[str, list[str]] = {}
    for output in outputs:
        if (found := output.evaluation) is not None:
            on = f" of {md.code(found.text, FILE_NAME)}" if found.text else ""
            base = f", against {md.code(found.base, FILE_NAME)}" if found.base else ""
            by = f", run by {md.text(found.engine, FILE_NAME)}" if found.engine else ""
            over = f"{found.n_scored} tokens in {found.n_windows} windows of {found.n_ctx}{on}{base}{by}"
            groups.setdefault(over, []).append(md.code(output.name, FILE_NAME))
    lines = []
    for over, names in groups.items():
        which = f" ({', '.join(names)})" if len(groups) > 1 or len(names) < len(outputs) else ""
        lines.append(f"Measured with `requant evaluate`{which} over {over}. KL divergences are in nats per token.")
    if not groups and any(_predicted_kl(o.made.plan) for o in outputs):
        lines.append("KL divergences are predicted, in nats per token; nothing was measured.")
    return lines


def _sections_by_output(outputs: Sequence[CardOutput], describe: Callable[[CardOutput], Iterable[str]]) -> list[str]:
    """Return a section for each output, under its name if there are several."""
    parts = []
    for output in outputs:
        found = [part for part in describe(output) if part]
        if found and len(outputs) > 1:
            parts.append(f"### {md.code(output.name, FILE_NAME)}")
        parts += found
    return parts


def _running_sections(outputs: Sequence[CardOutput], overrides: CardOverrides) -> list[str]:
    def describe(output: CardOutput) -> Iterable[str]:
        if overrides.repository:
            names = [file.name for file in output.files] or [output.name]
            words = ["hf", "download", overrides.repository, *map(file_argument, names), "--local-dir", "."]
            yield md.block(join_words(words), "sh")
        plan = output.made.plan
        modelfile = plan.runtime.get("engine") == "ollama"
        yield md.block(start_command(plan, output.made.output), "" if modelfile else "sh")
        yield budget_lines(plan)

    return _sections_by_output(outputs, describe)


def _mixtures_sections(outputs: Sequence[CardOutput]) -> list[str]:
    """Return a comparison with llama-quantize's mixtures for each source."""
    sources: dict[str, list[tuple[str, Plan]]] = {}
    for o in outputs:
        sources.setdefault(o.made.plan.header_sha256, []).append((o.name, o.made.plan))
    parts = list(filter(None, map(mixtures_table, sources.values())))
    note = (
        "Predicted from the same losses, that is with the same encoders; bytes are those of all tensors. "
        "Nothing in this table was measured."
    )
    return ["## Beside llama-quantize's mixtures", *parts, note] if parts else []


def _making_sections(outputs: Sequence[CardOutput]) -> list[str]:
    def describe(output: CardOutput) -> Iterable[str]:
        yield method_lines(output.made)
        yield md.block("\n".join(reproduction_commands(output.made)), "sh")

    return _sections_by_output(outputs, describe)


def _checksums_table(outputs: Sequence[CardOutput]) -> str:
    sums = []
    for output in outputs:
        made = output.made
        sums += [(f.name, "source", f.sha256) for f in output.source]
        sums.append((made.plan.source, "source, its header", made.plan.header_sha256))
        if made.imatrix is not None and made.imatrix_sha256 is not None:
            sums.append((made.imatrix, "importance", made.imatrix_sha256))
        sums.append((output.name, "plan", made.plan.sha256()))
        sums.append((output.name, "output, its header", made.header_sha256))
        sums += [(f.name, "output", f.sha256) for f in output.files]
    rows = dict.fromkeys((md.code(name, FILE_NAME), what, md.code(sha256)) for name, what, sha256 in sums)
    return md.table(["Of", "What", "SHA-256"], rows)


def _limits_list(outputs: Sequence[CardOutput]) -> str:
    plans = [o.made.plan for o in outputs]
    memory = "Memory figures hold for one GPU and the options above, not for other contexts, batches and cache types."
    predicted, lines = any(map(_predicted_kl, plans)), list[str]()
    if predicted or any(o.evaluation is not None and o.evaluation.mean_kld is not None for o in outputs):
        what = "how far the output's next tokens are from the source's, not how good either is"
        lines.append(f"KL divergence says {what}.")
    if predicted:
        lines.append("Predicted KL is a second-order estimate from the text that the losses were measured on.")
    if any(o.evaluation and o.evaluation.engine is None for o in outputs):
        lines.append("Measured figures are of F32 activations; engines that round them to 8 bits add a little.")
    if any(limit.device == "gpu" for plan in plans for limit in plan.limits):
        lines.append(memory)
    lines.append("Limits and licence of the source model hold for these files too.")
    return "\n".join(f"- {line}" for line in lines)
