"""Markdown in which strings from files stay text, and YAML in which they stay strings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from requant.errors import REMARK, brief, printable

# what means something to some Markdown: CommonMark, GitHub's tables, strikethrough and links, formulas; a number alone,
# which a full stop after it would make a list
_ACTIVE = re.compile(
    r"[\\`*{}\[\]<>|~&$^#!=\"@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.|^[-+]|^\d(?=\d*$)"
    r"|(?<=\d)[.)](?=\s|$)",
    re.I,
)
_PLAIN_CODE = re.compile(r"[A-Za-z0-9._/:,;=@%()#+*~<>&'^$!?\[\]{}-]+( [A-Za-z0-9._/:,;=@%()#+*~<>&'^$!?\[\]{}-]+)*")
_PLAIN_SCALAR = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")
_NOT_STRINGS = frozenset("true false yes no on off null y n inf nan".split())  # noqa: SIM905, of YAML 1.1 and 1.2


def text(string: str, most: int = REMARK) -> str:
    """`string` as one line that reads as it is spelled: what Markdown or HTML would act on as character references."""
    return _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", brief(string, most))


def code(string: str, most: int = REMARK) -> str:
    """`string` in a code span, also inside a table."""
    shown = brief(string, most)
    if _PLAIN_CODE.fullmatch(shown):
        return f"`{shown}`"
    return f"<code>{re.sub(r'[^A-Za-z0-9 ]', lambda found: f'&#{ord(found[0])};', shown)}</code>"


def link(shown: str, url: str) -> str:
    """`shown`, which is Markdown, as a link to `url`, which has nothing left to be quoted."""
    return f"[{shown}]({url})"


def address(name: str) -> str:
    """The path of a file, parted by slashes, as a relative URL."""
    return quote(b"".join(map(_utf8_bytes, name)), safe="/.-_~")


def _utf8_bytes(c: str) -> bytes:
    lone = "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass"  # a byte of a path that is no UTF-8
    return c.encode("utf-8", lone)


def block(string: str, language: str = "") -> str:
    """Lines in a fenced block."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", string)), default=0))
    return "\n".join([f"{fence}{language}", *map(printable, string.split("\n")), fence])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown; the columns in `right` are flush right."""
    marks = ["--:" if k in right else ":--" for k in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows))


def front_matter(values: Mapping[str, str | Sequence[str]]) -> str:
    """The YAML between two lines of dashes; what is empty is left out."""
    lines = ["---"]
    for key, value in values.items():
        if value and isinstance(value, str):
            lines.append(f"{key}: {scalar(printable(value))}")
        elif value:
            lines += [f"{key}:", *(f"- {scalar(printable(item))}" for item in value)]
    return "\n".join([*lines, "---"])


def scalar(string: str) -> str:
    """`string` as a scalar of YAML, plain where nothing could take it for something else than a string."""
    if _PLAIN_SCALAR.fullmatch(string) and string.lower() not in _NOT_STRINGS:
        return string
    return '"' + "".join(_escape_character(c) for c in string) + '"'


def _escape_character(c: str) -> str:
    if c in '"\\':
        return f"\\{c}"
    return c if " " <= c <= "~" else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\U{ord(c):08x}"
