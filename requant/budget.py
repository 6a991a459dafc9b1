"""What the user asked for, as constraints on the choice: limits in bytes, pins, floors, groups and allowed types.

--vram SIZE                the tensors on the GPU, KV cache, buffers and reserve
--ram SIZE                 what is on the CPU: tensors, their KV cache, lookup tables
--min-speed X              tokens per second of decoding, by bytes read over the devices' bandwidths
--max-loss X               predicted loss; the fewest bytes that keep it
--size SIZE                the whole output file, header and padding included
--bpw X                    8 x bytes / weights over all tensors of the file, those that stay as they are included
--tensor-type REGEX=TYPE   a pin: the type, whatever it costs; as in llama-quantize the expression is lower-cased,
                           searched in the name, and the first rule that matches decides
--min-type REGEX=TYPE      a floor: no type of fewer bits per weight, except a copy; the first match decides
--group REGEX              what matches with equal capture groups shares a type; without captures, all that matches
--types T,...              the types to choose from
"""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from requant.errors import UsageError, brief
from requant.formats import FORMATS, by_name, format_of
from requant.items import Item, items_of
from requant.limits import LOSS_UNIT, Limit, Timing
from requant.model.stock import mixtures
from requant.plan import Candidate, Losses, TensorLosses
from requant.records import nearest, suggest
from requant.request import Request, Rule

FILE_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
_FILTERS = threading.Lock()  # of warnings, which are the process's
DEVICE_ALIGNMENT = 128  # of a tensor in a CUDA buffer (ggml_backend_cuda_buffer_type_get_alignment)


@dataclass(frozen=True, slots=True)
class Problem:
    """One choice per item, within the limits: what the solver is given."""

    losses: Losses
    request: Request
    items: tuple[Item, ...]  # ordered by their first tensor
    notes: tuple[str, ...]


def vram_limit(budget: int, weights_limit: int) -> Limit:
    """--vram: of `budget` bytes, `weights_limit` are left for weights (negative where the rest alone is over)."""
    return Limit("--vram", budget, budget - weights_limit, device="gpu", alignment=DEVICE_ALIGNMENT)


def ram_limit(budget: int, other: int) -> Limit:
    """--ram: `other` bytes of it are no weights: caches and buffers of what runs on the CPU."""
    return Limit("--ram", budget, other, device="cpu", alignment=FILE_ALIGNMENT)


def speed_limit(tokens_per_second: float, timing: Timing) -> Limit:
    """--min-speed. Raises UsageError unless it is above 0."""
    if not 0 < tokens_per_second <= 1e6:
        raise UsageError(f"--min-speed must be above 0 and at most 1000000 (got {tokens_per_second:g})")
    return Limit("--min-speed", math.floor(1e9 / tokens_per_second), timing.fixed_ns, unit="ns")


def loss_limit(loss: float) -> Limit:
    """--max-loss. Raises UsageError unless it is above 0."""
    if not 0 < loss < 1e3:
        raise UsageError(f"--max-loss must be above 0 and below 1000 (got {loss:g})")
    return Limit("--max-loss", math.floor(loss / LOSS_UNIT), unit="loss")


def size_limit(budget: int, overhead: int, alignment: int = FILE_ALIGNMENT) -> Limit:
    """--size: bytes of the output file; `overhead` is its header up to the data, `alignment` the file's own."""
    return Limit("--size", budget, overhead, alignment=alignment)


def bpw_limit(bpw: float, losses: Losses) -> Limit:
    """--bpw: bits per weight over all tensors of the file. Raises UsageError unless 0 < bpw <= 64."""
    if not 0 < bpw <= 64:
        raise UsageError(f"--bpw must be above 0 and at most 64 (got {bpw:g})")
    n_weights = sum(t.n_weights for t in losses.tensors)
    return Limit("--bpw", math.floor(Fraction(str(bpw)) * n_weights / 8), n_weights=n_weights)


def parse_type(text: str, option: str) -> str:
    """The ggml type called `text` in any case. Raises UsageError naming near ones."""
    fmt = by_name(text.strip())
    if fmt is None:
        names = [f.name for f in FORMATS.values()]
        mixture = text.strip().upper() in mixtures()
        hint = (
            f"it is a mixture of types, which --preset takes; {suggest(text, names)}"
            if mixture
            else suggest(text, names)
        )
        raise UsageError(f"{option}: '{brief(text)}' is not a ggml type; {hint}")
    return fmt.name


def parse_written_type(text: str, option: str) -> str:
    """The ggml type called `text`, one that requant can write. Raises UsageError."""
    name, written = parse_type(text, option), [f.name for f in FORMATS.values() if f.can_encode]
    if name not in written:
        raise UsageError(f"{option}: {name} cannot be written; choose among {', '.join(written)}")
    return name


def parse_types(text: str, option: str = "--types") -> tuple[str, ...]:
    """The types in a list parted by commas. Raises UsageError."""
    return tuple(dict.fromkeys(parse_type(part, option) for part in text.split(",")))


def parse_rule(text: str, option: str = "--tensor-type") -> Rule:
    """REGEX=TYPE; the type follows the last `=`. Raises UsageError."""
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"{option}: '{brief(text)}' is not REGEX=TYPE")
    _compile(pattern, option)
    return Rule(option, pattern, parse_type(type_name, option))


def constrain(losses: Losses, request: Request) -> Problem:
    """The choices that the request leaves. Raises UsageError where it leaves none, or a rule matches nothing."""
    notes: list[str] = []
    allowed = _left(losses, request, notes)
    tied = [
        (members, _common_types([allowed[m] for m in members], losses, members, pattern))
        for members, pattern in _groups(losses, request.groups, notes)
    ]
    return Problem(losses, request, tuple(items_of(losses, request, tied)), tuple(notes))


def check_rules(losses: Losses, request: Request) -> None:
    """Try the request's expressions on the names. Raises UsageError where one is none, or matches nothing.

    Python matches without letting another thread go on, the one that hears signals included: called from the main
    thread before `constrain` in another, this is where Ctrl-C ends an expression that takes for ever.
    """
    patterns = [(rule.pattern.lower(), rule.option) for rule in request.pins]
    patterns += [(rule.pattern, rule.option) for rule in request.floors]
    for pattern, option in (*patterns, *((group, "--group") for group in request.groups)):
        _matching(pattern, option, losses)


def allowed_candidates(losses: Losses, request: Request) -> list[tuple[Candidate, ...]]:
    """What pins, --types and floors leave to each tensor, whatever the groups and the devices."""
    return _left(losses, request, [])


def _left(losses: Losses, request: Request, notes: list[str]) -> list[tuple[Candidate, ...]]:
    pins, floors = _Rules.of(request.pins, losses, lower=True), _Rules.of(request.floors, losses)
    _check_types(losses, request)
    notes.extend(f"{rule} decides nothing: earlier rules match the same tensors" for rule in pins.idle + floors.idle)
    named = _named_pins(losses, request)
    return [
        _allowed(t, named.get(t.name) or pins.first.get(i), floors.first.get(i), request.types, notes)
        for i, t in enumerate(losses.tensors)
    ]


@dataclass(frozen=True, slots=True)
class _Rules:
    """Which rule decides each tensor (by index), and the rules that never get to."""

    first: dict[int, Rule]
    idle: list[Rule]

    @classmethod
    def of(cls, rules: Iterable[Rule], losses: Losses, *, lower: bool = False) -> _Rules:
        first: dict[int, Rule] = {}
        idle = []
        for rule in rules:
            matched = _matching(rule.pattern.lower() if lower else rule.pattern, rule.option, losses)
            if not matched.keys() - first.keys():
                idle.append(rule)
            first = dict.fromkeys(matched, rule) | first
        return cls(first, idle)


def _compile(pattern: str, option: str) -> re.Pattern[str]:
    try:
        with _FILTERS, warnings.catch_warnings():
            # Python warns where it reads a set in another way than other engines, as in [[:digit:]]
            warnings.simplefilter("error", FutureWarning)
            return re.compile(pattern)
    except (re.error, FutureWarning, OverflowError, RecursionError) as error:
        raise UsageError(f"{option}: '{brief(pattern)}' is not a regular expression: {error}") from error


def _matching(pattern: str, option: str, losses: Losses) -> dict[int, re.Match[str]]:
    """Index of each tensor that may be quantized and matches, with the match."""
    compiled = _compile(pattern, option)
    every = {i: match for i, t in enumerate(losses.tensors) if (match := compiled.search(t.name))}
    free = {i: match for i, match in every.items() if losses.tensors[i].reason is None}
    if not free:
        what = "matches only tensors that stay as they are" if every else "matches no tensor"
        hint = _like(pattern, [t.name for t in losses.tensors if t.reason is None])
        raise UsageError(f"{option}: '{brief(pattern)}' {what}; {hint}")
    return free


def _like(pattern: str, names: Sequence[str]) -> str:
    """Which names, or parts of names, may have been meant by an expression that matches none of them."""
    if not names:
        return "no tensor of this model can be quantized"
    word = re.sub(r"\W+", ".", re.sub(r"\\.|\[[^]]*\]|\(|\)|[*+?^$|]", ".", pattern)).strip(".")
    parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
    near = nearest(word, names, 1) or nearest(word, parts, 1) or nearest(word.rpartition(".")[2], parts, 1)
    return f"did you mean {brief(near[0])}?" if near else f"names look like {brief(names[0])}"


def _check_types(losses: Losses, request: Request) -> None:
    """Every type of --types was scored for some tensor."""
    free = [t for t in losses.tensors if t.reason is None]
    scored = dict.fromkeys(c.type for t in free for c in t.candidates)
    for type_name in request.types:
        if free and type_name not in scored:
            reason = next((t.skipped[type_name] for t in free if type_name in t.skipped), None)
            raise UsageError(f"--types: {type_name} {_why_not(reason)}; the losses have {', '.join(scored)}")


def _why_not(reason: str | None) -> str:
    return (
        "was not scored: score again with it in --types" if reason is None else f"cannot be used: {brief(reason, 300)}"
    )


def _named_pins(losses: Losses, request: Request) -> dict[str, Rule]:
    """--output-tensor-type and --token-embedding-type, which go before --tensor-type as in llama-quantize."""
    pins = {}
    present = {t.name: t for t in losses.tensors}
    for name, type_name, option in (
        ("output.weight", request.output_type, "--output-tensor-type"),
        ("token_embd.weight", request.embedding_type, "--token-embedding-type"),
    ):
        if type_name is None:
            continue
        if name not in present:
            tied = name == "output.weight" and "token_embd.weight" in present
            hint = "; the embedding is the output too, use --token-embedding-type" if tied else ""
            raise UsageError(f"{option}: the model has no {name}{hint}")
        if (reason := present[name].reason) is not None:
            raise UsageError(f"{option}: {name} stays as it is: {brief(reason, 300)}")
        pins[name] = Rule(option, name, type_name)
    return pins


def _allowed(
    tensor: TensorLosses, pin: Rule | None, floor: Rule | None, types: Sequence[str], notes: list[str]
) -> tuple[Candidate, ...]:
    """The candidates that pins, --types and floors leave to a tensor, at least one."""
    if tensor.reason is not None:
        return tuple(c for c in tensor.candidates if c.type == tensor.source_type)
    if pin is not None:
        return (_pinned(tensor, pin),)
    left = tuple(c for c in tensor.candidates if not types or c.type in types)
    if not left:
        notes.append(f"{brief(tensor.name)} can have none of --types: all that were scored are considered")
        left = tensor.candidates
    if floor is None:
        return left
    fmt = format_of(floor.type)
    least = Fraction(fmt.block_bytes, fmt.block_weights)
    above = tuple(c for c in left if c.type == tensor.source_type or c.n_bytes >= least * tensor.n_weights)
    if not above:
        raise UsageError(f"{floor} leaves {brief(tensor.name)} none of {', '.join(c.type for c in left)}")
    return above


def _pinned(tensor: TensorLosses, pin: Rule) -> Candidate:
    found = next((c for c in tensor.candidates if c.type == pin.type), None)
    if found is None:
        fmt = format_of(pin.type)
        reason = tensor.skipped.get(pin.type)
        if reason is None and not fmt.divides(tensor.shape[0]):
            reason = f"rows of {tensor.shape[0]} are no whole blocks of {fmt.block_weights}"
        raise UsageError(f"{pin}: for {brief(tensor.name)}, {pin.type} {_why_not(reason)}")
    return found


def _groups(losses: Losses, patterns: Sequence[str], notes: list[str]) -> list[tuple[tuple[int, ...], str]]:
    """The members of each item, ordered by the first, with the pattern that tied them."""
    root = list(range(len(losses.tensors)))
    tied_by = [""] * len(root)

    def find(index: int) -> int:
        while root[index] != index:
            index = root[index]
        return index

    for pattern in patterns:
        leaders: dict[tuple[str | None, ...], int] = {}
        for index, match in _matching(pattern, "--group", losses).items():
            leader = leaders.setdefault(match.groups(), index)
            low, high = sorted((find(leader), find(index)))
            root[high] = low
            tied_by[low] = tied_by[low] or pattern
        if all(find(i) == i and root.count(i) == 1 for i in leaders.values()):
            notes.append(f"--group '{brief(pattern)}' ties no two tensors together")
    members: dict[int, list[int]] = {}
    for index in range(len(root)):
        members.setdefault(find(index), []).append(index)
    return [(tuple(found), tied_by[leader]) for leader, found in members.items()]


def _common_types(
    allowed: list[tuple[Candidate, ...]], losses: Losses, members: tuple[int, ...], pattern: str
) -> list[tuple[Candidate, ...]]:
    """The candidates of all members for each type they all may have. Raises UsageError where there is none."""
    by_type = [{c.type: c for c in candidates} for candidates in allowed]
    common = [name for name in by_type[0] if all(name in types for types in by_type)]
    if not common:
        tensors = [losses.tensors[m] for m in members]
        names = ", ".join(brief(t.name) for t in tensors[:3]) + (", ..." if len(tensors) > 3 else "")
        raise UsageError(f"--group '{brief(pattern)}': {names} have no allowed type in common")
    return [tuple(types[name] for types in by_type) for name in common]
