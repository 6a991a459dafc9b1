"""Names of outputs: templates filled from a model's metadata, which is reduced to characters that are safe in a name.

The default template follows GGUF's naming convention, BaseName-SizeLabel-FineTune-Version-Encoding.gguf, with an
encoding that llama.cpp accepts as a tag: the type that most of the encoded weights have, then the budget.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from requant.api.batch.jobs import JobBudget
from requant.common.units import parse_size
from requant.container.metadata import Metadata
from requant.container.shards import whole_name
from requant.errors import BadInput, printable
from requant.planning.plan import Plan

FIELDS = (
    *("name", "basename", "sizelabel", "finetune", "version", "arch", "stem"),  # of the source
    *("encoding", "budget", "vram", "ctx"),
)
UNKNOWN = "?"  # an encoding that depends on a plan not made yet
_MAX_FIELD = 64  # characters
_MAX_NAME = 200  # bytes; file systems allow 255, and .part.journal and .requant.json are appended
_SIZE = re.compile(r"(\d+x)?\d+(\.\d+)?[KMBTQ](-[A-Z]\d+(\.\d+)?[KMBTQ])?", re.IGNORECASE)
_VERSION = re.compile(r"v?\d+(\.\d+)*", re.IGNORECASE)
_ENCODING = re.compile(r"(i?q\d|tq\d|b?f(16|32|64)$|mxfp4|nvfp4)\w*", re.IGNORECASE)

# keys of a budget -> the letters in front of their value in a label; the first five decide the types
_LABELS = {"vram": "", "ram": "RAM", "size": "FILE", "bpw": "BPW", "max-loss": "LOSS", "min-speed": "TPS", "ctx": "CTX"}
_SIZES = ("vram", "ram", "size")
_DECIDING = tuple(_LABELS)[:5]


def template_fields(path: Path, metadata: Metadata, n_weights: int) -> dict[str, str]:
    """Return field -> text for the model in the file at `path`, from its metadata, else from the file's name."""
    stem = whole_name(path.name).removesuffix(".gguf")
    base, size, finetune, version = _parse_stem(stem)
    given = {key: _safe_text(metadata.get(f"general.{key}")) for key in ("name", "basename", "finetune")}
    label, number = (_safe_text(metadata.get(f"general.{key}")) for key in ("size_label", "version"))
    number = number if _VERSION.fullmatch(number) else version
    return {
        "name": given["name"] or _safe_text(stem) or "model",
        "basename": given["basename"] or _safe_text(base) or "model",
        "sizelabel": label if _SIZE.fullmatch(label) else _safe_text(size) or _size_label(n_weights),
        "finetune": given["finetune"] or _safe_text(finetune),
        "version": number and f"v{number.lstrip('vV')}",
        "arch": _safe_text(metadata.get("general.architecture")) or "model",
        "stem": _safe_text(stem) or "model",
    }


def _safe_text(text: object) -> str:
    """Reduce `text` to ASCII letters, digits and, between them, dots, dashes and _."""
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", text) if isinstance(text, str) else ""
    return re.sub(r"\.{2,}", ".", safe).strip("-._")[:_MAX_FIELD].rstrip("-._")


def _parse_stem(stem: str) -> tuple[str, str, str, str]:
    """Return (base name, size label, fine-tune, version) of a file's name, "" for each that it lacks."""
    parts = stem.split("-")
    if len(parts) > 1 and _ENCODING.fullmatch(parts[-1]):
        parts.pop()
    version = parts.pop() if len(parts) > 1 and parts[-1][:1] in "vV" and _VERSION.fullmatch(parts[-1]) else ""
    at = next((i for i, part in enumerate(parts) if i and _SIZE.fullmatch(part)), None)
    if at is None:
        return "-".join(parts), "", "", version
    end = at + 2 if at + 1 < len(parts) and _SIZE.fullmatch("-".join(parts[at : at + 2])) else at + 1
    return "-".join(parts[:at]), "-".join(parts[at:end]), "-".join(parts[end:]), version


def _size_label(n_weights: int) -> str:
    """Return the number of weights in the way of model names: 8.0B, 135M; rounded as gguf-py does."""
    letter, scale = next((x, s) for x, s in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", -1)) if n_weights > s)
    scaled = n_weights / max(scale, 1e3)
    return f"{scaled:.{1 if scaled < 9.5 else 0}f}{letter}"


def budget_label(budget: JobBudget) -> str:
    """Return the budget in capital letters, digits and _: 12G, 12G_CTX16K, BPW4_5; "" where the types are given."""
    if budget.label is not None:
        return budget.label
    keys = [key for key in _LABELS if key in budget.own or key in _DECIDING]
    return "_".join(_LABELS[key] + _value_label(key, value) for key in keys if (value := budget.value(key)) is not None)


def _value_label(key: str, value: str) -> str:
    if key in _SIZES:
        n = parse_size(value)
        units = (("G", 2**30), ("GB", 10**9), ("M", 2**20), ("MB", 10**6), ("K", 2**10))
        return next((f"{n // unit}{name}" for name, unit in units if n % unit == 0), f"{n}B")
    if key == "ctx" and value.isdecimal() and int(value) % 1024 == 0:
        return f"{int(value) // 1024}K"
    return re.sub(r"[^A-Z0-9]+", "_", value.upper())


def encoding_label(budget: JobBudget, plan: Plan | None) -> str:
    """Return the mixture, the single type or that of most encoded weights, then the budget; UNKNOWN without a plan."""
    head = budget.value("preset") or budget.value("type")
    if head is None:
        if plan is None:
            return UNKNOWN
        weights: Counter[str] = Counter()
        for choice in [c for c in plan.choices if not c.copied] or plan.choices:
            weights[choice.type] += choice.n_weights
        head = weights.most_common(1)[0][0]
    label = budget_label(budget)
    return re.sub(r"[^A-Z0-9]+", "_", head.upper()) + (f"_{label}" if label else "")


def check_template(jobs: Path, where: str, template: str) -> None:
    """Raise BadInput for a template that is not the name of a GGUF file, or has an unknown field."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadInput(jobs, f"{where}: output '{printable(template)}' is no template: {error}") from error
    for _, name, spec, conversion in parts:
        if name is not None and (name not in FIELDS or spec or conversion):
            near = get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else f"there are {', '.join(FIELDS)}"
            raise BadInput(jobs, f"{where}: output has no field '{{{printable(name)}}}'", hint=hint)
    if not template.endswith(".gguf") or "\0" in template:
        raise BadInput(jobs, f"{where}: output must end in .gguf", got=printable(template)[:80])


def output_path(jobs: Path, template: str, budget: JobBudget, encoding: str, fields: Mapping[str, str]) -> Path:
    """Fill the template into a path, relative to the folder of `jobs`.

    An empty field is removed with the dash before it. Raises BadInput where the name is then empty or too long.
    """
    own = {"encoding": encoding, "budget": budget_label(budget)}
    own |= {key: "" if (value := budget.value(key)) is None else _value_label(key, value) for key in ("vram", "ctx")}
    parts = [_fill_part(part, {**fields, **own}) for part in template.split("/")]
    for part, written in zip(parts, template.split("/"), strict=True):
        is_empty = part in ("", ".", "..", ".gguf") and part != written
        if is_empty or len(part.encode()) > _MAX_NAME:
            what = f"{budget.where}: '{printable(written)}' of the output gives no usable name for this model"
            raise BadInput(jobs, what, got=f"'{printable(part)[:80]}'", hint="put {stem} into it")
    return jobs.parent / "/".join(parts)


def _fill_part(part: str, fields: Mapping[str, str]) -> str:
    if "{" not in part:
        return part
    filled = part.format_map(fields)
    return re.sub(r"-+(?=\.)|^-+", "", re.sub(r"-{2,}", "-", filled))
