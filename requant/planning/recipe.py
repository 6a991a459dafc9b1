"""Recipes: plans from one type, a mixture, another file or a tensor-type file, and tensor-type files from plans.

llama-quantize splits a tensor-type file (one REGEX=TYPE a line) at white space, knows no comments, lower-cases each
expression and takes the first that it finds in the name. Files written here keep to that; files read here may also hold
`#` comments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from requant.container.imatrix import importance_for
from requant.container.source import Source, require_model
from requant.errors import BadInput, UsageError, brief
from requant.formats import Effort, by_name, format_of
from requant.model.hyperparameters import read_hyperparameters
from requant.model.kept import projector_types
from requant.model.mixtures import mixture_types
from requant.model.roles import (
    fallback_type,
    is_below,
    layer_of,
    needs_importance,
    never_quantize,
    role_of,
    usable_types,
)
from requant.planning.asked_types import add_asked_types, allow_type
from requant.planning.constraints import Constraints
from requant.planning.plan import Choice, Plan
from requant.planning.solver.solve import solve
from requant.scoring.candidates import build_losses, check_requantization, survey_tensors
from requant.scoring.losses import ALREADY_QUANTIZED, Losses, TensorLosses

if TYPE_CHECKING:
    from requant.container.imatrix import Imatrix

_BEYOND = re.compile("[^!-~]+")
_ANY_BEYOND = "[^!-~]+"
_SPECIAL = frozenset("\\^$.|?*+()[]{}")


def tensor_type_file(plan: Plan) -> str:
    """Return the plan as lines like `^blk\\.0\\.attn_q\\.weight$=q4_k`, for the tensors that may be quantized.

    Raises UsageError where no expression that llama-quantize accepts distinguishes two names.
    """
    free = [c for c in plan.choices if c.reason is None]
    patterns = [_pattern(c.name) for c in free]
    for choice in free if any(_is_loose(c.name) for c in free) else ():
        first = next(other for other, p in zip(free, patterns, strict=True) if re.search(p, choice.name, re.DOTALL))
        if first.type != choice.type:
            names = f"'{brief(first.name)}' and '{brief(choice.name)}'"
            raise UsageError(f"a tensor-type file cannot tell {names} apart; rename the tensors or use the plan itself")
    return "".join(f"{p}={c.type.lower()}\n" for p, c in zip(patterns, free, strict=True))


def _is_exact(c: str) -> bool:
    """Return whether an expression can spell the character: upper case is lowered, = and space separate."""
    return "!" <= c <= "~" and c != "=" and not c.isupper()


def _is_loose(name: str) -> bool:
    return not all(_is_exact(c) for c in name)


def _pattern(name: str) -> str:
    """An expression for this name, with wildcards for characters that it cannot spell.

    A run of characters beyond printable ASCII is one wildcard: engines count its bytes differently, and two wildcards
    in a row would take exponential time.
    """
    return f"^{_BEYOND.sub(_ANY_BEYOND, ''.join(_spell(c) for c in name))}$"


def _spell(c: str) -> str:
    if _is_exact(c):
        return f"\\{c}" if c in _SPECIAL else c
    return "." if "!" <= c <= "~" else c


def uniform_plan(
    source: Source,
    type_name: str,
    *,
    imatrix: Imatrix | None = None,
    constraints: Constraints | None = None,
    allow_requantize: bool = False,
    effort: Effort = Effort.DEFAULT,
) -> Plan:
    """Return the plan with `type_name` for every tensor that may have it, else llama-quantize's fallback, else a copy.

    Pins, groups and limits of the `constraints` hold. Nothing is measured: the plan predicts no loss.
    Raises BadInput for a source below Q8_0 without `allow_requantize`, and what `survey_tensors` and `solve` raise.
    """
    constraints = constraints or Constraints()
    wanted = list(dict.fromkeys((type_name, *_fallbacks(source, type_name))))
    pinned = [r.type for r in constraints.pins] + [
        t for t in (constraints.output_type, constraints.embedding_type) if t
    ]
    surveyed = survey_tensors(
        source, types=list(dict.fromkeys((*wanted, *pinned))), imatrix=imatrix, allow_requantize=allow_requantize
    )
    notes = check_requantization(source, surveyed)
    arch, is_float = require_model(source), format_of(type_name).block_weights == 1
    surveyed = tuple(  # to a type without blocks, small matrices are converted too: an engine may need it
        allow_type(t, type_name, arch) if t.reason is None or is_float else t for t in surveyed
    )
    preference = {name: float(rank) for rank, name in enumerate(wanted)}  # stands in for a loss
    ranked = [
        replace(t, candidates=tuple(replace(c, loss=preference.get(c.type, float(len(wanted)))) for c in t.candidates))
        for t in surveyed
    ]
    losses = build_losses(source, ranked, f"uniform {type_name}", imatrix, notes=notes, effort=effort)
    plan = solve(add_asked_types(losses, constraints), constraints)
    unknown = tuple(replace(c, loss=0.0) for c in plan.choices)
    how = "one type wherever it can be used"
    return replace(plan, choices=unknown, predicted_loss=None, gap=None, candidates={}, solver=how)


def preset_plan(
    source: Source,
    mixture: str,
    *,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    effort: Effort = Effort.DEFAULT,
) -> Plan:
    """Return the plan with llama-quantize's types in a `mixture` such as Q4_K_M; nothing is measured.

    Raises UsageError for a mixture that is not known, BadInput for a source below Q8_0 without `allow_requantize`.
    """
    hp = read_hyperparameters(source.metadata, source.tensors)
    types = mixture_types(mixture.upper(), source.tensors, hp, has_imatrix=imatrix is not None)
    return _plan_with_types(
        *(source, types, f"preset {mixture.upper()}"), imatrix=imatrix, allow_requantize=allow_requantize, effort=effort
    )


def types_like(source: Source, other: Source) -> tuple[dict[str, str], list[str]]:
    """Return the types of the tensors of `other` for those of `source` that can have them, and notes on the rest.

    Raises BadInput where `other` is of another architecture, or under half of the tensors are in both.
    """
    arch, types, left = require_model(source), dict[str, str](), list[str]()
    hint = "--like takes a model of the same architecture and size"
    if (found := require_model(other)) != arch:
        raise BadInput(other.path, "is of another architecture", got=found, expected=arch, hint=hint)
    common, n = sum(t.name in other for t in source.tensors), max(len(source.tensors), len(other.tensors))
    if 2 * common < n:
        raise BadInput(other.path, "is another model", got=f"{common} of {n} tensors in both", hint=hint)
    projectors = projector_types(source.metadata)
    for tensor in source.tensors:
        if never_quantize(arch, tensor.name, tensor.shape, tensor.type_id, projectors=projectors) is not None:
            continue
        fmt = other.tensor(tensor.name).format if tensor.name in other else None
        if fmt is not None and fmt.divides(tensor.n_per_row) and (fmt.can_encode or fmt == tensor.format):
            types[tensor.name] = fmt.name
        else:
            left.append(tensor.name)
    notes = [] if not left else [f"{len(left)} tensors have no type there that they can have, {brief(left[0])} first"]
    if not types:
        raise BadInput(other.path, "has no tensor of this model", hint=hint)
    return types, notes


def clone_plan(
    source: Source,
    other: Source,
    *,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    effort: Effort = Effort.DEFAULT,
) -> Plan:
    """Return the plan with the types of `other` for every tensor that can have them; the others stay as they are."""
    types, notes = types_like(source, other)
    plan = _plan_with_types(
        *(source, types, f"like {brief(other.name)}"), imatrix=imatrix, allow_requantize=allow_requantize, effort=effort
    )
    return replace(plan, notes=(*plan.notes, *notes))


def losses_like(losses: Losses, types: Mapping[str, str]) -> Losses:
    """Return `losses` without candidates larger than the type that `types` give the tensor, for a repair of a plan."""

    def limited(tensor: TensorLosses) -> TensorLosses:
        wanted = next((c for c in tensor.candidates if c.type == types.get(tensor.name)), None)
        if wanted is None or tensor.reason is not None:
            return tensor
        return replace(tensor, candidates=tuple(c for c in tensor.candidates if c.n_bytes <= wanted.n_bytes))

    return replace(losses, tensors=tuple(limited(t) for t in losses.tensors))


def _plan_with_types(
    source: Source,
    types: Mapping[str, str],
    method: str,
    *,
    imatrix: Imatrix | None,
    allow_requantize: bool,
    effort: Effort,
) -> Plan:
    """Build a plan that gives tensors these types; a type of more bits than the tensor's own leaves it as it is."""
    surveyed = survey_tensors(source, types=(), allow_requantize=allow_requantize)
    notes = check_requantization(source, surveyed)
    if imatrix is not None:
        types, more = _replace_unmeasured(source, types, imatrix)
        notes += more
    choices = []
    for tensor, known in zip(source.tensors, surveyed, strict=True):
        free = tensor.name in types and tensor.name not in source.preserved and known.reason != ALREADY_QUANTIZED
        wanted = types[tensor.name] if free else tensor.format.name
        fmt = tensor.format if not is_below(wanted, tensor.format.name) else format_of(wanted)
        reason = None if free else known.reason or "nothing says what it should be"
        device = "gpu" if known.on_gpu else "cpu"
        place = tensor.name, known.role, known.layer, tensor.shape, tensor.format.name
        choices.append(Choice(*place, fmt.name, fmt.n_bytes(tensor.n_weights), 0.0, 0.0, device, reason))
    return Plan(
        source=source.name,
        header_sha256=source.header_sha256,
        arch=require_model(source),
        method=method,
        budget={},
        limits=(),
        memory={},
        choices=tuple(choices),
        predicted_loss=None,
        gap=None,
        solver="types as given",
        notes=tuple(notes),
        effort=effort,
    )


def _replace_unmeasured(source: Source, types: Mapping[str, str], imatrix: Imatrix) -> tuple[dict[str, str], list[str]]:
    """Return `types` with others where a type needs importance that the imatrix does not have, and a note on them.

    llama-imatrix runs the trunk alone: layers of multi-token prediction, which are to be precise, get Q8_0.
    """
    unmeasured = [
        t
        for t in source.tensors
        if t.name in types
        and needs_importance(types[t.name], role_of(t.name))
        and importance_for(imatrix, t.name, t.shape) is None
    ]
    if not unmeasured:
        return dict(types), []
    n_trunk, replaced = read_hyperparameters(source.metadata, source.tensors).n_trunk, dict[str, str]()
    for tensor in unmeasured:
        predicts = (layer_of(tensor.name) or 0) >= n_trunk
        replaced[tensor.name] = "Q8_0" if predicts else "Q3_K" if types[tensor.name] == "IQ3_XXS" else "Q2_K"
    what = f"the imatrix does not cover {len(replaced)} tensors whose type would need it"
    note = f"{what}: they are {' or '.join(sorted(set(replaced.values())))} ({brief(next(iter(replaced)))} first)"
    return {**types, **replaced}, [note]


def _fallbacks(source: Source, type_name: str) -> list[str]:
    """The types for rows that are no whole blocks of `type_name`, as in llama-quantize."""
    rows = dict.fromkeys(t.n_per_row for t in source.tensors)
    found = [fallback_type(type_name, n) for n in rows if usable_types(n, [type_name])[1]]
    return [name for name in dict.fromkeys(found) if name is not None and _can_be_written(name)]


def _can_be_written(name: str) -> bool:
    fmt = by_name(name)
    return fmt is not None and fmt.can_encode
