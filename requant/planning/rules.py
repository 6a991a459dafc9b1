"""Types and REGEX=TYPE rules parsed from the user's text."""

from __future__ import annotations

from requant.errors import UsageError, brief, suggest
from requant.formats import FORMATS, by_name
from requant.model.mixtures import mixture_names
from requant.planning.constraints import Rule, compile_pattern


def parse_type(text: str, option: str) -> str:
    """The ggml type called `text` in any case. Raises UsageError naming near ones."""
    fmt = by_name(text.strip())
    if fmt is None:
        names = [f.name for f in FORMATS.values()]
        mixture = text.strip().upper() in mixture_names()
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
    compile_pattern(pattern, option)
    return Rule(option, pattern, parse_type(type_name, option))
