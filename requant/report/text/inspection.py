"""The inspection of a model as text: facts, types, roles, memory, tensors."""

from __future__ import annotations

import textwrap

from requant.common.units import format_size
from requant.errors import FILE_NAME, brief
from requant.model.inspection import Inspection, Share
from requant.model.kinds import LANGUAGE_MODEL
from requant.report.text.grid import WIDTH, fit_grid, grid, label_lines

_IN_TOKENS = ("context_length", "vocabulary", "window")


def model_tables(model: Inspection, width: int = WIDTH, *, tensors: bool = False) -> list[str]:
    """Return the tables of types, roles, memory and, on request, tensors; the roles' table gives up columns to fit."""
    parts = [_share_table("type", model.types), _share_table("role", model.roles, width), _memory_table(model, width)]
    return list(filter(None, (*parts, _tensor_table(model) if tensors else "")))


def model_facts(model: Inspection, width: int = WIDTH) -> str:
    """Return file, model, weights and shape. Names from the file are escaped."""
    title = "" if model.title is None else f"{brief(model.title)}, "
    state = "already quantized" if model.quantized else "not quantized"
    lines = [
        ("file", f"{name_files(model)}, {format_size(model.file_bytes)}, GGUF version {model.version}"),
        ("model", f"{title}architecture {brief(model.arch)}, {state}"),
        ("weights", count_weights(model)),
    ]
    if model.kind != LANGUAGE_MODEL.words:
        lines.insert(2, ("kind", model.kind))
    if model.hyperparameters is not None:
        known = ((key, value) for key, value in model.hyperparameters.items() if value)
        shown = (f"{key.replace('_', ' ')} {value}{' tokens' * (key in _IN_TOKENS)}" for key, value in known)
        lines.append(("shape", ", ".join(shown)))
    return "\n".join(label_lines(lines, width, label_width=9))


def name_files(model: Inspection) -> str:
    """Return the name of the first file and the number of the others."""
    more = f" and {len(model.files) - 1} more" if len(model.files) > 1 else ""
    return f"{brief(model.files[0], FILE_NAME)}{more}"


def count_weights(model: Inspection) -> str:
    """Return weights, tensors and bits per weight."""
    return f"{model.weights:,} in {len(model.tensors)} tensors, {model.bpw:.3f} bits per weight"


def _share_table(head: str, shares: tuple[Share, ...], width: int = WIDTH) -> str:
    rows = [[head, "tensors", "weights", "size", "bits/weight", "" if head == "type" else "types"]]
    for s in shares:
        types = "" if head == "type" else ", ".join(s.types)
        rows.append([brief(s.name), str(s.tensors), f"{s.weights:,}", format_size(s.n_bytes), f"{s.bpw:.2f}", types])
    return "\n".join(fit_grid(rows, width, right=(1, 2, 3, 4), spare=(5,)))


def _memory_table(model: Inspection, width: int) -> str:
    if model.needs is None:
        return ""
    n = model.needs
    parts = [("weights", n.weights), ("KV cache", n.kv_cache), ("compute buffer", n.compute)]
    parts += [("reserve", n.reserve)] if n.reserve else []
    parts += [("together", n.total)]
    caches = "/".join(dict.fromkeys((n.cache_type_k.lower(), n.cache_type_v.lower())))
    over = f" over {n.n_parallel} sequences" if n.n_parallel > 1 else ""
    reserve = "" if n.reserve else ", nothing in reserve"
    context = f"a context of {n.n_ctx} tokens{over} in {caches}"
    title = f"in VRAM, all layers, {context}, batches of {n.n_ubatch} tokens{reserve}"
    own = (model.hyperparameters or {}).get("context_length", n.n_ctx)
    beyond = [f"the model was made for a context of at most {own} tokens"] if n.n_ctx > own else []
    table = grid([[name, format_size(size)] for name, size in parts], right=(1,))
    return "\n".join([*textwrap.wrap(title, width), *table, *beyond])


def _tensor_table(model: Inspection) -> str:
    rows = [["tensor", "type", "shape", "size", "stays as it is because"]]
    for t in model.tensors:
        shape = " x ".join(map(str, t.shape))
        rows.append([brief(t.name), t.type, shape, format_size(t.n_bytes), t.reason or ""])
    return "\n".join(grid(rows, right=(3,)))
