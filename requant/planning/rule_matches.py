"""Rules tried on the names of tensors: what each matches, which one decides a tensor, and all that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from requant.errors import REMARK, UsageError, brief, find_similar
from requant.planning.constraints import Constraints, Rule, compile_pattern
from requant.scoring.losses import TOO_SMALL, Losses, TensorLosses

_SHOWN = 10  # faults that a message names


def check_rules(losses: Losses, constraints: Constraints) -> None:
    """Try the expressions of the rules on the names. Raises UsageError with all that are invalid or match nothing.

    While Python matches, no other thread runs, not even the one that handles signals: call this from the main thread
    before `constrain` runs in another, so that Ctrl-C ends an expression that takes for ever.
    """
    pins = (partial(match_pin, rule, losses) for rule in constraints.pins)
    floors = (partial(match_tensors, rule.pattern, rule.option, losses) for rule in constraints.floors)
    groups = (partial(match_tensors, pattern, "--group", losses) for pattern in constraints.groups)
    _match_all([*pins, *floors, *groups])


def match_tensors(pattern: str, option: str, losses: Losses) -> dict[int, re.Match[str]]:
    """Index of each tensor that may be quantized and matches -> the match. Raises UsageError where none does."""
    found = _match_names(pattern, option, losses)
    free = {i: match for i, match in found.items() if losses.tensors[i].reason is None}
    if not free:
        raise _mismatch(pattern, option, losses, found)
    return free


def match_pin(rule: Rule, losses: Losses) -> dict[int, re.Match[str]]:
    """Index of each tensor that the pin decides -> the match; as in llama-quantize, the expression is lower-cased.

    Tensors that are only too small to gain much are decided, too. A pin that asks for the type that tensors keep
    anyway, of norms for one, decides none. Raises UsageError where it matches nothing, or only tensors that keep
    another type.
    """
    pattern = rule.pattern.lower()
    found = _match_names(pattern, rule.option, losses)
    free = {i: match for i, match in found.items() if losses.tensors[i].reason in (None, TOO_SMALL)}
    if free:
        return free
    if not found:
        raise _mismatch(pattern, rule.option, losses, ())
    kept = [t for i in found if (t := losses.tensors[i]).source_type != rule.type]
    if kept:
        raise UsageError(f"{rule} {_describe_kept(kept)}")
    return {}


def _describe_kept(kept: Sequence[TensorLosses]) -> str:
    """Describe tensors that keep their types by one of them, a matrix if there is any, and its reason."""
    shown = next((t for t in kept if sum(n > 1 for n in t.shape) > 1), kept[0])
    what = f"matches only tensors that stay as they are; {brief(shown.name)} is {shown.source_type}"
    return f"{what}: {brief(shown.reason or '', REMARK)}"


def deciding_pins(losses: Losses, constraints: Constraints) -> tuple[dict[int, Rule], list[Rule]]:
    """Return the pin that decides each tensor (by index), and the pins that decide none because others come first.

    --output-tensor-type and --token-embedding-type precede --tensor-type, as in llama-quantize. Raises UsageError.
    """
    first, idle = _decide(constraints.pins, [partial(match_pin, rule, losses) for rule in constraints.pins])
    return first | _named_pins(losses, constraints), idle


def deciding_floors(losses: Losses, constraints: Constraints) -> tuple[dict[int, Rule], list[Rule]]:
    """Return the same for floors (--min-type)."""
    tries = [partial(match_tensors, rule.pattern, rule.option, losses) for rule in constraints.floors]
    return _decide(constraints.floors, tries)


_Try = Callable[[], dict[int, re.Match[str]]]


def _decide(rules: Sequence[Rule], tries: Sequence[_Try]) -> tuple[dict[int, Rule], list[Rule]]:
    first: dict[int, Rule] = {}
    idle = []
    for rule, matched in zip(rules, _match_all(tries), strict=True):
        if matched and not matched.keys() - first.keys():
            idle.append(rule)
        first = dict.fromkeys(matched, rule) | first
    return first, idle


def _match_all(tries: Iterable[_Try]) -> list[dict[int, re.Match[str]]]:
    """Return what every try matches. Raises UsageError with the faults of all, not of the first alone."""
    found, faults = [], list[str]()
    for attempt in tries:
        try:
            found.append(attempt())
        except UsageError as error:
            faults.append(str(error))
            if len(faults) > _SHOWN:
                break
    if faults:
        raise UsageError("; ".join(faults[:_SHOWN]) + ("; and more like these" if len(faults) > _SHOWN else ""))
    return found


def _named_pins(losses: Losses, constraints: Constraints) -> dict[int, Rule]:
    pins = {}
    present = {t.name: i for i, t in enumerate(losses.tensors)}
    for name, type_name, option in (
        ("output.weight", constraints.output_type, "--output-tensor-type"),
        ("token_embd.weight", constraints.embedding_type, "--token-embedding-type"),
    ):
        if type_name is None:
            continue
        if name not in present:
            tied = name == "output.weight" and "token_embd.weight" in present
            hint = "; the embedding is the output too, use --token-embedding-type" if tied else ""
            raise UsageError(f"{option}: the model has no {name}{hint}")
        tensor = losses.tensors[present[name]]
        if tensor.reason not in (None, TOO_SMALL) and tensor.source_type != type_name:
            raise UsageError(f"{option}: {name} stays as it is: {brief(tensor.reason or '', 300)}")
        pins[present[name]] = Rule(option, name, type_name)
    return pins


def _match_names(pattern: str, option: str, losses: Losses) -> dict[int, re.Match[str]]:
    compiled = compile_pattern(pattern, option)
    return {i: match for i, t in enumerate(losses.tensors) if (match := compiled.search(t.name))}


def _mismatch(pattern: str, option: str, losses: Losses, kept: Iterable[int]) -> UsageError:
    """Return the error for an expression that matches no tensor, or only those `kept` (by index)."""
    if tensors := [losses.tensors[i] for i in kept]:
        return UsageError(f"{option}: '{brief(pattern)}' {_describe_kept(tensors)}")
    hint = _suggest_name(pattern, [t.name for t in losses.tensors if t.reason is None])
    return UsageError(f"{option}: '{brief(pattern)}' matches no tensor; {hint}")


def _suggest_name(pattern: str, names: Sequence[str]) -> str:
    """A hint at the name, or part of a name, that an expression without a match was probably meant for."""
    if not names:
        return "no tensor of this model can be quantized"
    word = re.sub(r"\W+", ".", re.sub(r"\\.|\[[^]]*\]|\(|\)|[*+?^$|]", ".", pattern)).strip(".")
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = (
        find_similar(word, names, 1) or find_similar(word, parts, 1) or find_similar(word.rpartition(".")[2], parts, 1)
    )
    return f"did you mean {brief(near[0])}?" if near else f"names look like {brief(names[0])}"
