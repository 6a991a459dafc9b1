"""Markup: elements whose attributes are escaped, text from files that stays text, JSON inside a page."""

from __future__ import annotations

import html
import json
from typing import Any

from requant.errors import SHOWN
from requant.markup import escape

# what would end a script element or open a comment in it, and what old JavaScript took for the end of a line
_IN_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def text(value: object, most: int = SHOWN) -> str:
    """`value`, `most` characters of it, as text of an element: what may be seen of it, escaped."""
    return escape(value, most)


def tag(name: str, *content: str, **attributes: object) -> str:
    """The element `name` with `content`, which is markup already, and `attributes`, which are escaped here.

    An attribute that is None or False is left out, True stands without a value; `class_` is class, `_` a hyphen.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        words.append(label if value is True else f'{label}="{html.escape(str(value))}"')
    return f"<{' '.join(words)}>{''.join(content)}</{name}>"


def script_json(data: Any) -> str:
    """`data` as JSON that ends no script element, ASCII."""
    return json.dumps(data, separators=(",", ":")).translate(_IN_SCRIPT)
