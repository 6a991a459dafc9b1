"""Plan <-> tensor-type files: one REGEX=TYPE a line, as llama-quantize's --tensor-type-file takes them.

llama-quantize splits such a file at white space, knows no comments, lower-cases each expression and takes the first
that it finds in the name. What is written here keeps to that; what is read may hold `#` comments besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from requant.budget import Rule, parse_rule
from requant.errors import BadInput, UsageError, printable
from requant.plan import Plan
from requant.records import read_text

_BEYOND = re.compile("[^!-~]+")
_ANY_BEYOND = "[^!-~]+"
_SPECIAL = frozenset("\\^$.|?*+()[]{}")


def tensor_type_file(plan: Plan) -> str:
    """The plan as lines like `^blk\\.0\\.attn_q\\.weight$=q4_k`, for the tensors that may be quantized.

    Raises UsageError when two names cannot be told apart by expressions that llama-quantize would accept.
    """
    free = [c for c in plan.choices if c.reason is None]
    patterns = [_pattern(c.name) for c in free]
    for choice in free if any(_is_loose(c.name) for c in free) else ():
        first = next(other for other, p in zip(free, patterns, strict=True) if re.search(p, choice.name, re.DOTALL))
        if first.type != choice.type:
            names = f"'{printable(first.name)}' and '{printable(choice.name)}'"
            raise UsageError(f"a tensor-type file cannot tell {names} apart; rename the tensors or use the plan itself")
    return "".join(f"{p}={c.type.lower()}\n" for p, c in zip(patterns, free, strict=True))


def read_tensor_types(path: Path) -> tuple[Rule, ...]:
    """The rules of a tensor-type file, in order. Raises BadInput naming the line, InputOutputError."""
    option = "--tensor-type-file"
    rules = []
    for number, word in _words(read_text(path)):
        try:
            rules.append(parse_rule(word, option))
        except UsageError as error:
            raise BadInput(path, f"line {number}: {str(error).removeprefix(f'{option}: ')}") from error
    if not rules:
        raise BadInput(path, "holds no REGEX=TYPE")
    return tuple(rules)


def _words(text: str) -> Iterator[tuple[int, str]]:
    """Line number and word, without what follows a word that begins with #."""
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        for word in line.split():
            if word.startswith("#"):
                break
            yield number, word


def _is_exact(c: str) -> bool:
    """Whether the character can stand in an expression for itself: upper case would be lowered, = and space part it."""
    return "!" <= c <= "~" and c != "=" and not c.isupper()


def _is_loose(name: str) -> bool:
    return not all(_is_exact(c) for c in name)


def _pattern(name: str) -> str:
    """An expression for this name, with wildcards for what it cannot spell.

    A run of characters beyond printable ASCII is one wildcard: its bytes are not counted the same by every engine,
    and two wildcards in a row would take exponential time.
    """
    return f"^{_BEYOND.sub(_ANY_BEYOND, ''.join(_spelled(c) for c in name))}$"


def _spelled(c: str) -> str:
    if _is_exact(c):
        return f"\\{c}" if c in _SPECIAL else c
    return "." if "!" <= c <= "~" else c
