"""Markdown in which strings from files stay text, and YAML in which they stay strings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from requant.errors import REMARK, brief, printable
from requant.report.shell import encode_character

# characters with a meaning in CommonMark, GitHub's tables, strikethrough and links, or formulas; a number alone, which
# a full stop after it would turn into a list
_ACTIVE = re.compile(
    r"[\\`*{}\[\]<>|~&$^#!=\"@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.|^[-+]|^\d(?=\d*$)"
    r"|(?<=\d)[.)](?=\s|$)",
    re.I,
)
_PLAIN_CODE = re.compile(r"[A-Za-z0-9._/:,;=@%()#+*~<>&'^$!?\[\]{}-]+( [A-Za-z0-9._/:,;=@%()#+*~<>&'^$!?\[\]{}-]+)*")
_PLAIN_SCALAR = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")
_NOT_STRINGS = frozenset("true false yes no on off null y n inf nan".split())  # noqa: SIM905, of YAML 1.1 and 1.2


def text(string: str, most: int = REMARK) -> str:
    """Return `string` as one line of plain text: characters active in Markdown or HTML become references."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", brief(string, most))


def code(string: str, most: int = REMARK) -> str:
    """Return `string` in a code span, also inside a table."""
    cut = brief(string, most)
    if _PLAIN_CODE.fullmatch(cut):
        return f"`{cut}`"
    return f"<code>{re.sub(r'[^A-Za-z0-9 ]', lambda found: f'&#{ord(found[0])};', cut)}</code>"


def link(label: str, url: str) -> str:
    """Return `label`, which is Markdown, as a link to `url`, which is quoted already."""
    return f"[{label}]({url})"


def address(name: str) -> str:
    """Return the path of a file, separated by slashes, as a relative URL."""
    return quote(b"".join(map(encode_character, name)), safe="/.-_~")


def block(string: str, language: str = "") -> str:
    """Return lines in a fenced block."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", string)), default=0))
    return "\n".join([f"{fence}{language}", *map(printable, string.split("\n")), fence])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table of cells that are Markdown; the columns in `right` are flush right."""
    marks = ["--:" if k in right else ":--" for k in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def front_matter(values: Mapping[str, str | Sequence[str]]) -> str:
    """Return the YAML between two lines of dashes; empty values are left out."""
    lines = ["---"]
    for key, value in values.items():
        if value and isinstance(value, str):
            lines.append(f"{key}: {scalar(printable(value))}")
        elif value:
            lines += [f"{key}:", *(f"- {scalar(printable(item))}" for item in value)]
    return "\n".join([*lines, "---"])


def scalar(string: str) -> str:
    """Return `string` as a scalar of YAML, plain only if every reader takes it for a string."""
    if _PLAIN_SCALAR.fullmatch(string) and string.lower() not in _NOT_STRINGS:
        return string
    return '"' + "".join(_escape_character(c) for c in string) + '"'


def _escape_character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    return c if " " <= c <= "~" else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\U{ord(c):08x}"
