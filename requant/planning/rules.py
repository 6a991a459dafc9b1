"""Option values parsed from typed text or from Python: sizes, numbers, contexts, types, REGEX=TYPE rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from requant.common.serialization import read_text
from requant.common.units import parse_size, suggest_number
from requant.container.infos import FORK, FORK_TYPES
from requant.errors import BadInput, UsageError, brief, suggest
from requant.formats import FORMATS, by_name
from requant.model.engine_settings import CACHE_TYPES, OWN_CONTEXT
from requant.model.mixtures import MIXTURE_ALIASES, main_type, mixture_names
from requant.planning.constraints import Rule, compile_pattern
from requant.planning.engines import engine_named, parse_bandwidth

MAX_CONTEXT = -1  # --ctx max
AUTO = "AUTO"  # a cache type that planning chooses
LARGEST = 2**31 - 1  # of a whole number
_MAX_FILE, _MAX_RULES = 1 << 22, 10_000  # bytes and rules of a tensor-type file; each is tried on every tensor
_FAULTS = 10  # lines of a file that a message names
_INSTEAD = {  # of a share or of `auto` for a size
    "--vram": "give the bytes that the card has, as in 12GiB: nvidia-smi, rocm-smi and vulkaninfo show them; "
    "--reserve SIZE leaves some of it free",
    "--ram": "give bytes, as in 32GiB: free -h shows what the machine has",
    "--size": "give bytes, as in 5GiB: requant inspect shows those of the model; or --bpw X, bits per weight",
    "--reserve": "give bytes, as in 1GiB, or leave it out for a tenth of --vram, at most 1GiB",
}
_JOINED = re.compile(r"[^=]+=([A-Za-z0-9_]+),.*=")  # rules as --custom-q of ik_llama.cpp takes them


def parse_text(value: object, option: str) -> str:
    """Return the text. Raises UsageError for anything else."""
    if not isinstance(value, str):
        raise UsageError(f"{option} must be text (got {brief(repr(value))})")
    return value


def parse_bytes(value: int | str, option: str, least: int = 1) -> int:
    """Return the bytes of a whole number or of text with a unit, at least `least`. Raises UsageError."""
    try:
        return parse_size(str(int(value)) if _is_whole(value) else value, least)  # type: ignore[arg-type]
    except (UsageError, TypeError) as error:
        if isinstance(value, str) and _is_list(value, least):
            what = f"'{brief(value)}' is a list, and this option takes one size; --vram of plan takes several"
            raise UsageError(f"{option}: {what}") from error
        if isinstance(value, str) and (hint := _alternative_to_size(value.strip(), option)):
            raise UsageError(f"{option}: '{brief(value)}' is not a size; {hint}") from error
        raise UsageError(f"{option}: {error}") from error


def _alternative_to_size(text: str, option: str) -> str:
    """Return what to give in place of a share or of a word such as `auto`; an empty text for other texts."""
    if not text.endswith("%") and text.lower() not in ("auto", "all", "max", "full", "none", "default"):
        return ""
    return _INSTEAD.get(option, "give bytes with a unit, as in 12GiB")


def _is_list(text: str, least: int) -> bool:
    """Return whether `text` is a list of sizes, each with its unit."""
    try:
        return all(not part.strip().isdigit() and parse_size(part, least) for part in text.split(","))
    except UsageError:
        return False


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Return the bytes of each size in a comma-separated list. Raises UsageError, for a decimal comma too."""
    parts = text.split(",")
    bare = [part.strip().isdigit() for part in parts]
    if (any(bare) and not all(bare)) or re.fullmatch(r"\s*[0-9]+,[0-9]{1,2}\s*", text):  # a decimal comma
        return (parse_bytes(text, option),)
    return tuple(parse_bytes(part, option) for part in parts)


def parse_count(value: Any, option: str, low: int = 1, high: int = LARGEST) -> int:
    """Return a whole number from `low` to `high`. Raises UsageError."""
    if not _is_whole(value) or not low <= value <= high:
        raise UsageError(f"{option} must be a whole number from {low} to {high} (got {brief(repr(value))})")
    return int(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's numbers too


def parse_number(value: Any, option: str, high: float = float("inf")) -> float:
    """Return a number from 0 to `high`. Raises UsageError."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= high:
        raise UsageError(f"{option} must be a number that is not negative, {high:g} at most (got {brief(repr(value))})")
    return float(value)


def parse_context(value: Any, option: str) -> int:
    """Return tokens of a context, OWN_CONTEXT, or MAX_CONTEXT for `max`. Raises UsageError."""
    return MAX_CONTEXT if value == "max" else parse_count(value, option, OWN_CONTEXT)


def parse_context_text(text: str, option: str) -> int:
    """Return tokens of a context as `parse_tokens` does, or MAX_CONTEXT for `max`. Raises UsageError."""
    return MAX_CONTEXT if text.lower() == "max" else parse_tokens(text, option)


def parse_tokens(text: str, option: str) -> int:
    """Return tokens, `16k` being 16384, or OWN_CONTEXT. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,10})([kK]?)", text)
    n = -1 if match is None else int(match[1]) * (1024 if match[2] else 1)
    if not OWN_CONTEXT <= n <= LARGEST:
        what = f"'{brief(text)}' is no number of tokens"
        hint = suggest_number(text, whole=True) or "write 16384, 16k, or 0 for the model's own"
        raise UsageError(f"{option}: {what}; {hint}")
    return n


def parse_any_cache_type(value: object, option: str) -> str:
    """Return the name in capitals, or AUTO; the model's settings check whether the type exists."""
    return parse_text(value, option).upper()


def parse_cache_type(text: str, option: str) -> str:
    """Return the type of a KV cache, or AUTO. Raises UsageError naming near ones."""
    if text.upper() not in (AUTO, *CACHE_TYPES):
        names = [AUTO.lower(), *(name.lower() for name in CACHE_TYPES)]
        raise UsageError(f"{option}: '{brief(text)}' is no cache type; {suggest(text, names)}")
    return text.upper()


def parse_fixed_cache_type(text: str, option: str) -> str:
    """Return the type of a KV cache. Raises UsageError for `auto`, too."""
    found = parse_cache_type(text, option)
    if found == AUTO:
        raise UsageError(f"{option}: a plan chooses among types; name one")
    return found


def parse_rates(value: str | Mapping[str, float], _: str) -> tuple[tuple[str, float], ...]:
    """Return (device, bytes per second) pairs from `gpu=448,cpu=60` or a mapping in GB/s. Raises UsageError."""
    text = value if isinstance(value, str) else ",".join(f"{device}={rate}" for device, rate in value.items())
    return tuple(parse_bandwidth(text).items())


def parse_engine(value: object, option: str) -> str | None:
    """Return the name of an engine, None for the default. Raises UsageError naming near ones."""
    return engine_named(parse_text(value, option)).name or None


def parse_mixture(value: object, option: str) -> str:
    """Return the name of a mixture of llama-quantize, for Q4_K and its like that of the mixture that it stands for.

    Raises UsageError naming near ones.
    """
    text = parse_text(value, option)
    name = MIXTURE_ALIASES.get(text.upper(), text)
    if name.upper() not in mixture_names():
        what = f"'{brief(text)}' is no mixture known here"
        if text.strip().upper() in FORK_TYPES:
            raise UsageError(f"{option}: '{brief(text)}' is {FORK}; {_like_fork_type(text, mixture_names())}")
        if (fmt := by_name(text)) is not None:
            raise UsageError(f"{option}: {what}; it is one type: --type {fmt.name}")
        raise UsageError(f"{option}: {what}; {suggest(text, mixture_names())}")
    return name


def parse_type(value: object, option: str) -> str:
    """Return the ggml type called `value` in any case. Raises UsageError naming near ones."""
    text = parse_text(value, option)
    fmt = by_name(text.strip())
    if fmt is None:
        raise UsageError(f"{option}: '{brief(text)}' {_describe_other_type(text.strip().upper(), option)}")
    return fmt.name


def _describe_other_type(name: str, option: str) -> str:
    """Return what a word is that is no ggml type, and what was probably meant."""
    types = [f.name for f in FORMATS.values()]
    if name in mixture_names():
        meant = f"give --preset {name}" if option == "--type" else f"did you mean {main_type(name)}?"
        return f"is not a ggml type; it is a mixture of types: {meant}"
    if name in FORK_TYPES:
        return f"is {FORK}; {_like_fork_type(name, types)}"
    return f"is not a ggml type; {suggest(name, types)}"


def _like_fork_type(name: str, known: Iterable[str]) -> str:
    """Return a hint at the one of the `known` names that a type of the fork repacks, or at those of as many bits."""
    known, repacked = list(known), re.sub("_R[0-9]+$", "", name.strip().upper())
    if repacked in known:
        return f"did you mean {repacked}?"
    bits = [re.findall("[0-9]+", word)[:1] for word in (repacked, *known)]
    alike = [word for word, found in zip(known, bits[1:], strict=True) if found == bits[0]]
    return f"of as many bits are {', '.join(alike or known)}"


def parse_written_type(value: object, option: str) -> str:
    """Return the ggml type called `value`, one that requant can write. Raises UsageError."""
    name, written = parse_type(value, option), [f.name for f in FORMATS.values() if f.can_encode]
    if name not in written:
        raise UsageError(f"{option}: {name} cannot be written; choose among {', '.join(written)}")
    return name


def parse_types(value: str | Iterable[str], option: str = "--types") -> tuple[str, ...]:
    """Return the types in a comma-separated list or in several. Raises UsageError."""
    text = value if isinstance(value, str) else ",".join(value)
    return tuple(dict.fromkeys(parse_type(part, option) for part in text.split(",")))


def parse_rule(text: str, option: str = "--tensor-type") -> Rule:
    """Return the rule REGEX=TYPE; the type follows the last `=`. Raises UsageError."""
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"{option}: '{brief(text)}' is not REGEX=TYPE")
    if (joined := _JOINED.match(text)) is not None and by_name(joined[1]) is not None:
        raise UsageError(f"{option}: '{brief(text)}' is more than one rule; write each alone, without commas")
    compile_pattern(pattern, option)
    return Rule(option, pattern, parse_type(type_name, option))


def parse_rules(value: Mapping[str, str] | Iterable[str], option: str) -> tuple[Rule, ...]:
    """Return the rules of {REGEX: TYPE}, or of texts REGEX=TYPE. Raises UsageError."""
    texts = [f"{regex}={type_name}" for regex, type_name in value.items()] if isinstance(value, Mapping) else value
    return tuple(parse_rule(text, option) for text in texts)


def parse_patterns(value: str | Iterable[str], _: str) -> tuple[str, ...]:
    """Return one regular expression, or several; they are compiled where the names of tensors are known."""
    return (value,) if isinstance(value, str) else tuple(value)


def read_tensor_types(path: Path) -> tuple[Rule, ...]:
    """Read the rules of a tensor-type file, in order. Raises BadInput naming every line at fault, InputOutputError."""
    option = "--tensor-type-file"
    rules, faults = list[Rule](), list[str]()
    for number, word in _words(read_text(path, _MAX_FILE)):
        if len(rules) >= _MAX_RULES:
            raise BadInput(path, f"line {number}: too many rules", limit=_MAX_RULES)
        try:
            rules.append(parse_rule(word, option))
        except UsageError as error:
            faults.append(f"line {number}: {str(error).removeprefix(f'{option}: ')}")
    if faults:
        more = f"; and {len(faults) - _FAULTS} more" if len(faults) > _FAULTS else ""
        raise BadInput(path, "; ".join(faults[:_FAULTS]) + more)
    if not rules:
        raise BadInput(path, "holds no REGEX=TYPE")
    return tuple(rules)


def _words(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and word, up to a word of the line that begins with #; spaces around = separate no words."""
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        for word in re.sub(r"\s+=\s*|=\s+", "=", line).split():
            if word.startswith("#"):
                break
            yield number, word
