"""The reference pages in docs/reference, from the code: commands, Python, files, exit codes, formats, engines.

    python scripts/docs/reference.py [--check]

`--check` writes nothing and fails where a page is not what the code says.
"""

import argparse
import dataclasses
import importlib
import inspect
import io
import re
import sys
import tokenize
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import requant
from requant import errors
from requant.api.keywords import Planning, Scoring
from requant.cli.command import common
from requant.cli.help_pages import ENVIRONMENT, EXIT_CODES, OTHER, Page, full_headings
from requant.cli.help_pages import PAGES as MANUAL
from requant.cli.main import COMMANDS, main
from requant.common.serialization import IN_MEMORY
from requant.formats import FORMATS, BlockFormat
from requant.model import cache_kinds, mixtures
from requant.model.forward.architecture import FAMILIES
from requant.planning import engines as runtime

FOLDER = ROOT / "docs" / "reference"
NOTE = "<!-- written by scripts/docs/reference.py from the code; changes belong there -->"
# page of docs/ that says more about a command
GUIDES = {
    "inspect": "memory",
    "calibrate": "imatrix",
    "score": "scoring",
    "plan": "budgets",
    "convert": "tutorial",
    "batch": "batch",
    "evaluate": "scoring",
    "verify": "reliability",
    "report": "publishing",
}
# file or printed object -> (what it is, the dataclass of it or None)
FILES = {
    "requant.losses": ("`requant score -o LOSSES.json`", "requant.scoring.losses.Losses"),
    "requant.plan": (
        "`requant plan -o PLAN.json`; `layers` in [its own page](../engines.md#layers-for-tools-that-place-them)",
        "requant.planning.plan.Plan",
    ),
    "requant.plans": ("`requant plan --vram A,B --json`: `plans`, a list of them", None),
    "requant.output": ("`OUT.gguf.requant.json`, the record of an output", "requant.conversion.record.Conversion"),
    "requant.layers": (
        "[the layers](../engines.md#layers-for-tools-that-place-them), in a plan and in the metadata of an output",
        None,
    ),
    "requant.frontier": (
        "`requant plan --frontier --json`: `points`, a list of them",
        "requant.planning.frontier.Point",
    ),
    "requant.verify": (
        "`requant verify --json`, with its [verdict](../reliability.md#what-verification-compares)",
        "requant.conversion.verification.Verification",
    ),
    "requant.digests": (
        "the [digests](../reliability.md#what-verification-compares) in the metadata of an output",
        None,
    ),
    "requant.diff": ("`requant diff --json`", None),
    "requant.inspect": ("`requant inspect --json`", "requant.model.inspection.Inspection"),
    "requant.evaluation": ("`requant evaluate --json`", "requant.scoring.evaluate.Evaluation"),
    "requant.explanation": ("`requant plan --explain NAME --json`", None),
    "requant.reports": ("what reports a batch has written, in its state", None),
    "requant.version": ("`requant --version --json`", None),
    "requant.progress": ("a line of `--progress json`: [programs](../progress.md#for-programs)", None),
    "requant.batch": ("`requant batch --json`, and `summary.json` in its state", "requant.api.batch.summary.Row"),
    "requant.kept": ("sums of a calibration that was interrupted", None),
    "requant.entry": ("an entry in the cache of a batch: losses, importance or plans", None),
    "requant.made": ("what a batch has made, in its state", None),
}
PARTS = {  # dataclasses inside of others
    "requant.scoring.losses.Losses": ["requant.scoring.losses.TensorLosses", "requant.scoring.losses.Candidate"],
    "requant.planning.plan.Plan": [
        "requant.planning.plan.Choice",
        "requant.planning.constraints.Limit",
        "requant.planning.plan.LayerSummary",
        "requant.planning.constraints.Timing",
    ],
    "requant.conversion.record.Conversion": [
        "requant.conversion.record.Converted",
        "requant.conversion.record.Compensation",
        "requant.conversion.record.Anomalies",
        "requant.conversion.record.SourceDigest",
    ],
    "requant.model.inspection.Inspection": [
        f"requant.model.inspection.{name}" for name in ("Share", "TensorEntry", "Needs")
    ],
}


def cell(text: str) -> str:
    """`text` on one line of a table."""
    return " ".join(str(text).replace("|", r"\|").split())


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> str:
    heads = list(heads)
    marks = {"l": "---", "r": "--:", "c": ":-:"}
    lines = [heads, [marks[align[i] if i < len(align) else "l"] for i in range(len(heads))]]
    lines += [[cell(c) for c in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


by_id = [f.name for f in FORMATS.values()]


# commands


def one_command(name: str) -> str:
    command = main.get_command(click.Context(main), name)
    context = click.Context(command, info_name=f"requant {name}", terminal_width=100, max_content_width=100)
    usage = " ".join(command.collect_usage_pieces(context))
    page = MANUAL.get(name, Page())
    parts = [f"## requant {name}", paragraphs(command.help), f"```text\nrequant {name} {usage}\n```"]
    if page.examples:
        lines = [f"# {e.what}\n{e.command}" for e in page.examples]
        parts.append("```sh\n" + "\n\n".join(lines) + "\n```")
    if page.files:
        parts.append(table(["file", ""], [(f"`{what}`", text) for what, text in page.files]))
    parts += options_tables(command, context)
    more = [f"Exit codes: {', '.join(map(str, page.exit_codes))} ([what they mean](exit-codes.md))."]
    see = [f"[{other}](#requant-{other})" for other in page.see]
    guide = GUIDES.get(name)
    see += [f"[the guide](../{guide}.md)"] if guide else []
    more += [f"See also {', '.join(see)}."] if see else []
    return "\n\n".join([*parts, " ".join(more)])


def options_tables(command: click.Command, context: click.Context) -> Iterator[str]:
    """The options under their headings, in the order of the help; of a command those that not every command has."""
    left_out = set() if command is main else {"--help", *(p.opts[-1] for p in common())}
    options = [p for p in command.get_params(context) if isinstance(p, click.Option) and p.opts[-1] not in left_out]
    records = {p.opts[-1]: record for p in options if (record := p.get_help_record(context)) is not None}
    placed = [name for names in full_headings().values() for name in names]
    for heading, names in (*full_headings().items(), (OTHER, [n for n in records if n not in placed])):
        rows = [(f"`{records[n][0]}`".replace("|", "&#124;"), plain(records[n][1])) for n in names if n in records]
        if rows:
            yield table([heading, ""], rows)


def paragraphs(text: str | None) -> str:
    """A help text with click's marks taken out."""
    blocks = inspect.cleandoc(text or "").replace("\b\n", "").split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks)


def plain(text: str) -> str:
    """Without the brackets that click puts around a default in words."""
    return escaped(re.sub(r"\[default: \(([^()]*)\)", r"[default: \1", text))


def escaped(text: str) -> str:
    return re.sub(r"(?<!`)<([a-z])", r"&lt;\1", text)


def commands() -> str:
    top = table(["command", "what it does"], [(f"[{n}](#requant-{n})", what) for n, what in COMMANDS.items()])
    rest = options_tables(main, click.Context(main, info_name="requant"))
    variables = table(["variable", ""], [(f"`{name}`", escaped(text)) for name, text in ENVIRONMENT])
    intro = (
        "Every command says the same with `--help`, or `requant help COMMAND`. stdout is the result, stderr everything "
        "else; `--json` prints one object. Sizes take KiB, MiB and GiB, or KB, MB and GB as powers of ten."
    )
    parts = [
        "# Commands",
        NOTE,
        intro,
        top,
        "Before any command; `--progress`, `-q`, `-v` and `--debug` behind its name, too:",
        *rest,
        "In the environment:",
        variables,
    ]
    return "\n\n".join([*parts, *map(one_command, COMMANDS)])


# Python


def python() -> str:
    names = sorted(n for n in requant.__all__ if n != "errors")
    intro = (
        "All public names, from their docstrings; [From Python](../python.md) shows them at work. Results show "
        "themselves in notebooks."
    )
    parts = ["# Python", NOTE, intro]
    parts += [one_name(name, getattr(requant, name)) for name in names]
    parts += ["## Keywords", "Those of `Model`'s methods that end in `**asked`."]
    parts += [f"### {kind.__name__}\n\n{doc(kind)}\n\n{keywords_table(kind)}" for kind in (Planning, Scoring)]
    parts += ["## Errors", errors_text()]
    return "\n\n".join(parts)


def keywords_table(kind: type) -> str:
    """The keywords that a TypedDict adds to those of its base, and their types."""
    own = {n: h for n, h in kind.__annotations__.items() if kind is Scoring or n not in Scoring.__annotations__}
    return table(["keyword", "type"], [(f"`{n}`", f"`{h.__forward_arg__}`") for n, h in own.items()])


def one_name(name: str, thing: object) -> str:
    if not inspect.isclass(thing):
        return f"## requant.{name}\n\n```text\n{signature(f'requant.{name}', thing)}\n```\n\n{doc(thing)}"
    parts = [f"## requant.{name}", doc(thing)]
    if dataclasses.is_dataclass(thing):
        parts.append(fields_table(thing))
    for method, member in public_members(thing):
        if isinstance(member, property):
            parts.append(f"### {name}.{method}\n\n{doc(member)}")
        else:
            function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            parts.append(
                f"### {name}.{method}\n\n```text\n{signature(f'{name}.{method}', function)}\n```\n\n{doc(function)}"
            )
    return "\n\n".join(part for part in parts if part)


def public_members(kind: type) -> Iterator[tuple[str, object]]:
    fields = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for name, member in vars(kind).items():
        works = callable(member) or isinstance(member, (property, classmethod, staticmethod))
        if works and name not in fields and not name.startswith("_"):
            yield name, member


@dataclasses.dataclass(frozen=True)
class Bare:
    """An annotation that is shown as it is written."""

    text: str

    def __repr__(self) -> str:
        return self.text


def written(function: types.FunctionType) -> inspect.Signature:
    """The signature as it stands in the source, where another is shown to help() and to notebooks."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    plain_function = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    plain_function.__defaults__, plain_function.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    plain_function.__annotations__ = function.__annotations__
    return inspect.signature(plain_function)


def bare(annotation: object) -> object:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def signature(name: str, function: object) -> str:
    """`name(...)`, an argument a line where that is long; keywords that several functions share as one."""
    found = written(function)
    kept = [
        p.replace(annotation=bare(p.annotation)) for p in found.parameters.values() if p.name not in ("self", "cls")
    ]
    found = found.replace(parameters=kept, return_annotation=bare(found.return_annotation))
    one = f"{name}{found}"
    if len(one) <= 100:
        return one
    lines, starred = [], False
    for parameter in kept:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines, starred = [*lines, "    *,"], True
        lines.append(f"    {parameter},")
    return "\n".join([f"{name}(", *lines, f"){str(found).rpartition(')')[2]}"])


def doc(thing: object) -> str:
    """Its docstring; an indented part becomes a block of code."""
    text = inspect.cleandoc(inspect.getdoc(thing) or "")
    blocks = text.split("\n\n")
    return "\n\n".join(f"```text\n{inspect.cleandoc(b)}\n```" if b.startswith("    ") else escaped(b) for b in blocks)


def comments_of(kind: type) -> dict[str, str]:
    """What stands behind a field of a dataclass, as a comment."""
    found: dict[str, str] = {}
    name = None
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(kind)).readline):
        if token.type == tokenize.NAME and token.start[1] == 4 and token.line.strip().startswith(f"{token.string}:"):
            name = token.string
        if token.type == tokenize.COMMENT and name and token.line.strip().startswith(name):
            found[name] = token.string.removeprefix("#").strip()
    return found


def fields_table(kind: type) -> str:
    comments = comments_of(kind)
    kept = (f for f in dataclasses.fields(kind) if f.metadata != IN_MEMORY)
    rows = [(f"`{f.name}`", f"`{shown_type(f.type)}`", comments.get(f.name, "")) for f in kept]
    return table(["field", "type", ""], rows)


def shown_type(annotation: object) -> str:
    return (annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))).strip("'")


def errors_text() -> str:
    rows = []
    for kind in error_classes():
        rows.append((f"`requant.errors.{kind.__name__}`", str(kind.exit_code), first_line(kind)))
    return table(["error", "exit code", ""], rows, "lr")


def error_classes() -> list[type]:
    kinds = [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, errors.RequantError)]
    return sorted(kinds, key=lambda k: k.exit_code)


def first_line(thing: object) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


# exit codes


def exit_codes() -> str:
    intro = (
        "A failure is one line on stderr, `requant: error: FILE: what (got X, limit Y); what to do`, and one of these "
        "codes. In Python it is the error of that name in `requant.errors`, whose attributes hold the figures."
    )
    names = {kind.exit_code: f"`{kind.__name__}`" for kind in error_classes() if kind is not errors.RequantError}
    rows = [(str(code), meaning, names.get(code, "")) for code, meaning in EXIT_CODES.items()]
    return "\n\n".join(["# Exit codes", NOTE, intro, table(["exit code", "meaning", "in Python"], rows, "rll")])


# files


def schemas() -> dict[str, str]:
    """Every schema that the code names, without its number -> with it."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "requant").rglob("*.py")):
        for name, number in re.findall(r'"(requant\.[a-z]+)/(\d+)"', path.read_text(encoding="utf-8")):
            found[name] = f"{name}/{number}"
    return found


def files() -> str:
    names = schemas()
    intro = (
        "Every file of ours is JSON in ASCII with a `schema`; the number after the slash grows when the meaning of a "
        "field changes. Plans and losses can be edited by hand: reading is strict, and an unknown key, a wrong type or "
        "a size that does not fit is exit code 3 with the place. Sizes are bytes, losses nats per token where the "
        "method is `fisher` or `kfac`."
    )
    rows = [(f"`{full}`", FILES[name][0] if name in FILES else "") for name, full in sorted(names.items())]
    parts = ["# Files", NOTE, intro, table(["schema", "where"], rows), beside()]
    for name, full in sorted(names.items()):
        kind = FILES.get(name, ("", None))[1]
        if kind is not None:
            parts += [f"## {full}", *(described(k) for k in (kind, *PARTS.get(kind, ())))]
    return "\n\n".join(parts)


def beside() -> str:
    rows = [
        ("`OUT.gguf.requant.json`", "its record: plan, types, measured errors, SHA-256 of every tensor"),
        ("`OUT.gguf.part`", "the output while it is not finished, locked by the run that fills it"),
        ("`OUT.gguf.part.journal`", "what of it is on disk, for the run that goes on"),
        ("`OUT.gguf.part.imatrix`", "importance that scoring measured"),
        ("`JOBS.toml.requant`", "state of a batch"),
    ]
    return f"Beside an output, and of a batch:\n\n{table(['file', 'what it is'], rows)}"


def described(path: str) -> str:
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    return f"`{name}`: {doc(kind)}\n\n{fields_table(kind)}"


# formats, engines, presets, architectures


def formats() -> str:
    intro = (
        "Decoding is bit for bit ggml's, on any bytes. Candidates are Q4_0 to Q8_0 and Q2_K to Q6_K unless `--types` "
        "or `--engine` says otherwise."
    )
    heads = ["type", "id", "block", "bytes", "bits per weight", "read", "written", "what a block holds"]
    rows = [
        (f"`{f.name}`", str(f.type_id), str(f.block_weights), str(f.block_bytes), f"{f.bpw:g}", *abilities(f))
        for f in FORMATS.values()
    ]
    return "\n\n".join(["# Formats", NOTE, intro, table(heads, rows, "lrrrrccl")])


def abilities(f: BlockFormat) -> tuple[str, str, str]:
    """Whether it is read, whether written, and what its module says of its block."""
    if not f.can_decode:
        return "copied", "-", ""
    words = first_sentence(f.kernels).removesuffix(f"; {f.bpw:g} bits per weight.")
    return "yes", "yes" if f.can_encode else "-", words


def first_sentence(module: object) -> str:
    line = (inspect.getdoc(module) or "").split("\n\n")[0]
    return " ".join(line.split()).partition(": ")[2] or line


def engines() -> str:
    rows = []
    for e in runtime.ENGINES.values():
        never = "; ".join(f"{d}: {few(t)}" for d, t in e.cannot.items()) or "-"
        rates = ", ".join(f"{d} {rate / runtime.GB:g}" for d, rate in e.bandwidth.items())
        placed = f"{e.order} layers first" if e.has_gpu else "no GPU"
        chosen = f"{few(e.candidates)}; {e.preferred} preferred" if e.preferred else few(e.candidates)
        rows.append((f"`{e.name}`", chosen, never, placed, "yes" if e.experts else "no", rates))
    heads = ["engine", "candidates", "does not run", "to the GPU", "experts apart", "GB/s assumed"]
    presets = [(f"`{m}`", mixtures._MIXTURES[m][0], f"{mixtures._MIXTURES[m][1]:g}") for m in mixtures.mixture_names()]
    run = [(f"`{n}`", f.activation, "halves" if f.halves else "pairs") for n, f in FAMILIES.items()]
    usual = ", ".join(runtime.GENERIC.candidates)
    known = ", ".join(f"`{n}`" for n in sorted(cache_kinds.ATTENTION | cache_kinds.RECURRENT | cache_kinds._HYBRID))
    return "\n\n".join(
        [
            "# Engines, presets, architectures",
            NOTE,
            "## Engines",
            f"`--engine E`; [how to choose](../engines.md). The usual candidates are {usual}.",
            table(heads, rows),
            "## Presets",
            "`--preset M`: the mixtures of llama-quantize. Bits per weight are those of Llama 3.1 8B.",
            table(["preset", "most tensors", "bits per weight"], presets, "llr"),
            "## Architectures that are run",
            "Scored by gradients, and measured by `evaluate`. All others are scored without running them.",
            table(["general.architecture", "activation", "rotated dimensions"], run),
            "## Architectures whose cache is known",
            f"For `--vram` and `--ram`: {known}. Others need `--assume`.",
        ]
    )


def few(names: Iterable[str]) -> str:
    """Names of types, in the shorter of two ways: those, or all but the others."""
    wanted = set(names)
    ways = (listed(n in wanted for n in by_id), f"all but {listed(n not in wanted for n in by_id)}")
    return min(ways, key=len)


def listed(chosen: Iterable[bool]) -> str:
    """The types that are chosen, in the order of FORMATS; the candidates without `--types` as one."""
    names = [name for name, is_one in zip(by_id, chosen, strict=True) if is_one]
    usual = runtime.GENERIC.candidates
    if set(usual) <= set(names):
        names = ["the usual", *(n for n in names if n not in usual)]
    return ", ".join(names)


PAGES = {
    "commands.md": commands,
    "python.md": python,
    "files.md": files,
    "exit-codes.md": exit_codes,
    "formats.md": formats,
    "engines.md": engines,
}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page() + "\n"
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"docs/reference: {', '.join(stale)}: not what the code says; run python scripts/docs/reference.py")


if __name__ == "__main__":
    run()
