"""Mutants of JSON and of tensor-type files: edited as values, written, then edited as text."""

import json
import math

NUMBERS = (0, 1, -1, 0.5, 1e-300, 1e308, 2**31, 2**53, 2**63 - 1, 2**63, 10**40, -0.0, 0.1, 3)
OTHERS = (None, True, False, "", "Q4_K", "q8_0", "NVFP4", "gpu", "cpu", "none", "\x1b[2J", "\u202e", "\ud800")
OTHERS += ("x" * 200, "blk.0.attn_q.weight", "bytes", "ns", "loss", "default", "IQ2_XXS", "I32")
CONTAINERS = ("[]", "{}", "[[]]", "[1, 2]", '{"a": 1}')  # as text: each mutant gets its own
TEXTS = (
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 400,
    "9" * 5000,
    "[" * 3000,
    "{",
    "}",
    "]",
    ",",
    ":",
    '"',
    "\\u0000",
    "\\ud800",
    "null",
)
TEXTS += ("\x00", "\ufeff", "\u202e", "{}", "-", ".5", "true", '"schema": "requant.plan/2",', '"a":')
WORDS = (
    "(",
    ")",
    "(?",
    "(?i)",
    "(?P<n>",
    "(?<=a*)",
    "[",
    "[[",
    "[a--b]",
    "]",
    "*",
    "+",
    "{1,2}",
    "{99999999999}",
    "\\",
    "\\9",
)
WORDS += (
    "\\p",
    "|",
    ".",
    "^",
    "$",
    "=",
    "=q4_k",
    "=Q9",
    "=",
    "\n",
    " ",
    "#",
    "\t",
    "\ufeff",
    "\x1b",
    "\u202e",
    "(" * 200,
    "x" * 500,
)
WORDS += ("(?:", "(?#", "(?(1)", "(?-i:", "\\x", "\\N{x}", "\\u12", "a&&b", "[^", "(?a)", "(?L)", "(?u)")

TOML_WORDS = (
    *(
        "a." * 2000 + "a=1",
        "[" * 3000,
        "{" * 3000,
        "[[" + "a." * 2000 + "a]]",
        "{a=" * 300,
        "9" * 5000,
        "0x" + "f" * 3000,
    ),
    *("=", '"', "'", '"""', "'''", "#", "\\", "\n", "[[job]]", "[report]", "[defaults]", "inf", "nan", "-0", "1e999"),
    *("1979-05-27", "00:00:00", "true", "{", "}", "[", "]", ",", ".", '"" = 1', "\\uD800", "\x00", "\ufeff", "\u202e"),
    *("a=1\n" * 1000, "a" * 5000, "'a'." * 1000),
)
TOKEN_WORDS = (
    *(",", " ", "\n", "-1", "2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *(
        "9" * 5000,
        "0" * 5000,
        "1.5",
        "1e9",
        "nan",
        "0x1",
        "\u0663",
        "\x00",
        "\ufeff",
        "+",
        "-",
        "--1",
        "a",
        "1" * 12,
        "1," * 5000,
    ),
)


def edit_value(rng, value):
    """One change somewhere in `value`, a list or dict."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if not keys:
        return
    key = rng.choice(keys)
    child = value[key]
    if isinstance(child, dict | list) and child and rng.random() < 0.8:
        edit_value(rng, child)
        return
    kind = rng.random()
    if kind < 0.55:
        value[key] = _other(rng, child)
    elif kind < 0.7:
        del value[key]
    elif kind < 0.8:
        other = rng.choice(keys)
        value[key], value[other] = value[other], value[key]
    elif isinstance(value, list):
        value.insert(rng.randrange(len(value) + 1), child)
    else:
        value[rng.choice((*keys, "type", "x", "\x1b[2J"))] = child


def _other(rng, value):
    kind = rng.random()
    if isinstance(value, int | float) and kind < 0.7:
        return rng.choice(NUMBERS) if kind < 0.5 or not math.isfinite(value) else value + rng.choice((-1, 1, 0.5))
    if kind < 0.45:
        return rng.choice(NUMBERS) if kind < 0.3 else json.loads(rng.choice(CONTAINERS))
    return rng.choice(OTHERS)


def json_mutant(rng, bases):
    """Bytes of a JSON file; bases: texts of sound ones, of which the first most often."""
    text = bases[0] if rng.random() < 0.8 else rng.choice(bases)
    if rng.random() < 0.85:
        value = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            edit_value(rng, value)
        if rng.random() < 0.5:  # what states a digest of the rest says that the rest was edited
            value.pop("sha256", None)
            if isinstance(value.get("plan"), dict):
                value["plan"].pop("sha256", None)
        text = json.dumps(value)
        if rng.random() < 0.85:
            return text.encode("utf-8", "surrogatepass")
    return text_edited(rng, text, TEXTS, rng.choice(bases))


def toml_mutant(rng, bases):
    """Bytes of a batch file."""
    text = rng.choice(bases)
    return text.encode() if rng.random() < 0.1 else text_edited(rng, text, TOML_WORDS, rng.choice(bases))


def tokens_mutant(rng, bases):
    """Bytes of a file of token ids."""
    return text_edited(rng, rng.choice(bases), TOKEN_WORDS, rng.choice(bases))


def lines_mutant(rng, bases):
    """Bytes of a tensor-type file."""
    return text_edited(rng, rng.choice(bases), WORDS, rng.choice(bases))


def text_edited(rng, text, words, other):
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, n, kind = rng.randrange(len(text) + 1), rng.randrange(1, 30), rng.random()
        if kind < 0.5:
            text = text[:at] + rng.choice(words) + text[at + (n if kind < 0.15 else 0) :]
        elif kind < 0.65:
            text = text[:at] + text[at + n :]
        elif kind < 0.8:
            text = text[: at + n] + text[at:]
        elif kind < 0.9:
            start = rng.randrange(len(other) + 1)
            text = text[:at] + other[start : start + n] + text[at:]
        else:
            text = text[:at]
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and content:
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return content
