"""HTML elements whose strings stay text: escaped content and attributes, tables, JSON for a script."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable

from requant.errors import SHOWN, brief

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;", "`": "&#96;"})
# characters that end a script element or open a comment in it, and line ends of old JavaScript
_IN_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def escape(string: str) -> str:
    """Return `string` as content of an element or value of a quoted attribute."""
    return string.translate(_ENTITIES)


def text(value: object, most: int = SHOWN) -> str:
    """Return at most `most` characters of `value` as escaped text, whatever it holds: controls are spelled out."""
    return escape(brief(str(value), most))


def tag(name: str, *content: str, **attributes: object) -> str:
    """Return the element `name` with `content`, which is markup already, and `attributes`, which are escaped here.

    An attribute that is None or False is left out, True stands without a value; `class_` is class, `_` a hyphen.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        words.append(label if value is True else f'{label}="{escape(str(value))}"')
    return f"<{' '.join(words)}>{''.join(content)}</{name}>"


def table(head: Iterable[str], rows: Iterable[str], *, caption: str = "", **attributes: object) -> str:
    """Return a table; `head` are cells and `rows` whole rows, both markup, `caption` a caption's element or ''."""
    return tag("table", caption, tag("thead", tag("tr", *head)), tag("tbody", *rows), **attributes)


def head_cells(labels: Iterable[str], right: Container[int]) -> Iterable[str]:
    """Return the heads of columns; those in `right` are flush right."""
    return (tag("th", label, scope="col", class_="num" if i in right else None) for i, label in enumerate(labels))


def number_cell(figure: str) -> str:
    """Return a cell that is flush right."""
    return tag("td", figure, class_="num")


def script_json(data: object) -> str:
    """Return `data` as JSON in ASCII that ends no script element."""
    return json.dumps(data, separators=(",", ":")).translate(_IN_SCRIPT)
