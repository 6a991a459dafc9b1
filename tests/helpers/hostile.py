"""A stranger's files: every string in them tries to be more than a string.

`MARK` is in all of them and in nothing else, so that one that is opened, imported, compiled or run can be told.
"""

import json
import struct

import numpy as np
from conversions import half, single
from gguf_files import ARR, F32, STR, U32, File, pair

MARK = "EVIL7f3a"
JINJA = "{{ cycler.__init__.__globals__.os.popen('touch " + MARK + "').read() }}"
LONG = 2**20
# what is tried: on the terminal, in tables, shells, spreadsheets, pages, templates, paths
TRIED = {
    "colour": "\x1b[31m\x1b[2J",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://example.invalid\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "c1": "\x9b31m\x85",
    "newline": "\r\nrequant: error: all is lost\n",
    "row": "\nblk.9.attn_q.weight  Q4_K  256 x 8  1.13 KiB",
    "cells": "  Q4_K  256 x 8  1.13 KiB  ",
    "bidi": "\u202e\u2066gpj.\u2069\u202c",
    "separator": "\u2028\u2029\u00a0\u3000",
    "invisible": "\u200b\u2060\u3164\u2800\ufe0f\u115f\U000e0041",
    "marks": "a" + "\u0300\u20dd" * 9,
    "leftward": "\u05d0\u05d1 \u0627\u0628 12",
    "wide": "\u6a21\u578b",
    "shell": "`touch x`$(touch x)';\"&|>x",
    "formula": '=HYPERLINK("http://example.invalid",1)',
    "page": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "template": JINJA,
    "format": "%s%n{0.__class__}{}",
    "path": "../../../../tmp/" + MARK,
    "root": "/tmp/" + MARK,
    "device": "/dev/tcp/127.0.0.1/9",
    "url": "http://example.invalid/" + MARK,
}
EVERYTHING = MARK + "".join(TRIED.values())
# tensors' names: no control characters, which the header's check refuses, and 63 bytes
NAMES = [
    name
    for kind, text in TRIED.items()
    if kind not in ("colour", "title", "link", "clipboard", "c1", "newline", "row")
    for name in ("blk.1." + MARK + text.encode()[:38].decode(errors="ignore") + ".weight",)
]
HYPERPARAMETERS = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": 256,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 4,
    "rope.dimension_count": 64,
}


def strings(architecture="llama"):
    """The pairs of every key that is shown, and some that nobody knows."""
    return (
        pair("general.architecture", STR, architecture),
        pair("general.name", STR, EVERYTHING + "x" * LONG),
        pair("general.tags", ARR, (STR, [MARK, *TRIED.values()])),
        pair("general.quantization_version", STR, EVERYTHING),
        pair("general.file_type", STR, EVERYTHING),
        pair("general.url", STR, TRIED["url"]),
        pair("tokenizer.chat_template", STR, JINJA),
        pair("requant.source.header_sha256", STR, EVERYTHING),
        pair(EVERYTHING, STR, b"\xff\xfe" + EVERYTHING.encode()),
    )


def vocabulary(tokens=(), pre=EVERYTHING):
    """The pairs of a tokenizer of 256 bytes and more `tokens`."""
    return (
        pair("tokenizer.ggml.model", STR, "gpt2"),
        pair("tokenizer.ggml.pre", STR, pre),
        pair("tokenizer.ggml.tokens", ARR, (STR, list(tokens))),
        pair("tokenizer.ggml.scores", ARR, (F32, [0.0] * len(tokens))),
    )


def model(architecture="llama"):
    """A model (File) whose tensors are called `NAMES`, with all the pairs of `strings`."""
    keys = tuple(pair(f"{architecture}.{key}", U32, value) for key, value in HYPERPARAMETERS.items())
    matrices = [half(name, (256, 8), seed=i) for i, name in enumerate(NAMES)]
    usual = [half("token_embd.weight", (256, 32)), half("blk.0.attn_q.weight", (256, 8)), single("blk.0.n", (256,))]
    tokens = vocabulary([MARK + text for text in (TRIED | {str(i): str(i) for i in range(32 - len(TRIED))}).values()])
    return File((*strings(architecture), *keys, *tokens), (*usual, *matrices))


def imatrix():
    """An importance matrix (File) of some of the model's tensors, and of others."""
    named = [name for name in ("blk.0.attn_q.weight", *NAMES[:4], MARK + TRIED["leftward"]) if len(name.encode()) < 54]
    parts = [(single(f"{n}.in_sum2", (256, 1), np.ones(256)), single(f"{n}.counts", (1, 1), np.ones(1))) for n in named]
    keys = (
        pair("general.type", STR, "imatrix"),
        pair("imatrix.datasets", ARR, (STR, [EVERYTHING + "x" * LONG])),
        pair("imatrix.chunk_count", U32, 1),
        pair("imatrix.chunk_size", U32, 512),
    )
    return File(keys, tuple(t for both in parts for t in both))


def legacy_imatrix(name=EVERYTHING):
    """The bytes of a .dat file with an entry `name` and a data set that is called everything."""
    both = [text.encode()[:1000] for text in (name, EVERYTHING)]
    entries = b"".join(struct.pack("<i", len(n)) + n + struct.pack("<ii256f", 1, 256, *[1.0] * 256) for n in both[:1])
    return struct.pack("<i", 1) + entries + struct.pack("<ii", 1, len(both[1])) + both[1]


def poisoned(text, keep=()):
    """The JSON `text` of one of requant's files with every string replaced but those that are checked when read."""
    checked = {"schema", "sha256", "name", "type", "source_type", "device", "unit", "effort", "header_sha256", *keep}

    def poison(value, key=""):
        if isinstance(value, dict):
            return {k: v if k in checked else poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value] or ([EVERYTHING] if key == "notes" else [])
        return EVERYTHING if isinstance(value, str) else value

    return json.dumps(poison(json.loads(text)))
