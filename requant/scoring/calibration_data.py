"""Calibration data: windows of token ids from a text, a file of ids, the shipped text, or drawn at random."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from requant.common.serialization import read_text
from requant.container.source import Source
from requant.errors import BadInput, UsageError, brief
from requant.model.tokenizer import Ids, read_tokenizer
from requant.scoring.options import CalibrationOptions

SHIPPED = "calibration.txt"
SHIPPED_NAME, DRAWN_NAME = f"requant's {SHIPPED}", "random token ids"  # of the windows without --text or --tokens
_MAX_TEXT = 1 << 24  # bytes; its tokens take 200 times as much memory while it is split
_WORD, _INTEGER = re.compile(r"[^\s,]+"), re.compile(r"[+-]?[0-9]+")
_SEED = 1
_DRAWN = 8  # windows of drawn ids by default


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """`n` windows of `n_ctx` tokens, spread over a text; None: all that it has.

    held_out: windows that lie between those that are taken without it.
    """

    n_ctx: int = 512
    n: int | None = None
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class TokenWindows:
    """Windows (n_windows, n_ctx) of token ids; name: of their text; notes: lines for the user."""

    name: str
    windows: Ids
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text; bos: the id that begins every text, or None; n_unknown: ids of text that has no token."""

    ids: Ids
    bos: int | None
    n_unknown: int = 0


Encode = Callable[[Source, str], Encoded]


def encode(source: Source, text: str) -> Encoded:
    """Return the ids of a text in the vocabulary of `source`. Raises BadInput, UsageError as `read_tokenizer`."""
    tokenizer = read_tokenizer(source.metadata)
    ids = tokenizer.encode(text)
    unknown = 0 if tokenizer.unknown is None else int((ids == tokenizer.unknown).sum())
    return Encoded(ids, tokenizer.bos, unknown)


def read_text_windows(path: Path, source: Source, size: WindowSpec, encode: Encode = encode) -> TokenWindows:
    """Return windows of the UTF-8 text at `path`.

    Raises BadInput for a text that is no UTF-8, is too short, or is mostly unknown to the vocabulary.
    """
    text = read_text(path, _MAX_TEXT).removeprefix("\ufeff")
    return _cut_text(path, encode(source, text), Path(path).name, size)


def shipped_windows(source: Source, size: WindowSpec, encode: Encode = encode) -> TokenWindows:
    """Return windows of the text that ships with requant: prose, code, mathematics, chat, many languages."""
    text = files("requant.scoring").joinpath(SHIPPED).read_text(encoding="utf-8")
    found = _cut_text(source.path, encode(source, text), SHIPPED_NAME, size)
    return replace(found, notes=())  # nobody can give a longer one


def read_token_windows(path: Path, source: Source, size: WindowSpec) -> TokenWindows:
    """Return windows of the ids in the file at `path`: whole numbers with white space or commas between them."""
    text, n_vocab = read_text(path), source.tensor("token_embd.weight").n_rows
    most = len(str(n_vocab))  # digits
    ids = array("i")
    for match in _WORD.finditer(text):  # not all words at once, which would take 30 times the bytes of the file
        word = match[0]
        if not _INTEGER.fullmatch(word):
            hint = "give whole numbers with spaces between"
            raise BadInput(path, "is no list of token ids", got=brief(word), hint=hint)
        digits = word.lstrip("+0") or "0"
        if len(digits) > most or not 0 <= int(digits) < n_vocab:
            what, limit = "has an id that is no token of the model", f"0 to {n_vocab - 1}"
            raise BadInput(path, what, got=brief(word), limit=limit)
        ids.append(int(digits))
    return _cut_windows(path, np.array(ids, np.int32), Path(path).name, size, None)


def drawn_windows(source: Source, size: WindowSpec) -> TokenWindows:
    """Return windows of ids drawn evenly from the vocabulary, the same every time."""
    n_vocab = source.tensor("token_embd.weight").n_rows
    rng = np.random.default_rng(_SEED + size.held_out)
    ids = rng.integers(0, n_vocab, (size.n or _DRAWN, size.n_ctx), np.int32)
    return TokenWindows(DRAWN_NAME, ids)


def default_windows(source: Source, size: WindowSpec, encode: Encode = encode) -> TokenWindows:
    """Return windows of the shipped text, or of random ids, with a note on why, where the vocabulary cannot be read."""
    try:
        return shipped_windows(source, size, encode)
    except (BadInput, UsageError) as error:
        note = f"the model is run on random token ids, which makes worse plans: {error}"
        return replace(drawn_windows(source, size), notes=(note,))


def _cut_text(path: Path, text: Encoded, name: str, size: WindowSpec) -> TokenWindows:
    if 3 * text.n_unknown > len(text.ids):
        what = "is in a script that the model's vocabulary does not have"
        got = f"{text.n_unknown} of {len(text.ids)} tokens unknown"
        raise BadInput(path, what, got=got, hint="give another --text")
    return _cut_windows(path, text.ids, name, size, text.bos)


def _cut_windows(path: Path, ids: Ids, name: str, size: WindowSpec, bos: int | None) -> TokenWindows:
    """Cut ids into windows and take those of `size`; they begin with BOS where every text does."""
    n_ctx, n = size.n_ctx, len(ids) // size.n_ctx
    if n == 0:
        limit, hint = f"at least one window of {n_ctx}", "give a longer one, or a smaller --window"
        raise BadInput(path, "is too short", got=f"{len(ids)} tokens", limit=limit, hint=hint)
    wanted = n if size.n is None else min(n, size.n)
    taken = np.arange(wanted) * n // wanted
    if size.held_out:
        left = np.setdiff1d(np.arange(n), taken)
        wanted = min(len(left), wanted)
        if wanted == 0:
            raise BadInput(path, "is too short to hold some of it out", got=f"{n} windows", limit=f"over {len(taken)}")
        taken = left[np.arange(wanted) * len(left) // wanted]
    windows = ids[: n * n_ctx].reshape(n, n_ctx)[taken]
    if bos is not None:
        windows[:, 0] = bos
    notes: tuple[str, ...] = ()
    if size.n is not None and n < size.n:
        notes = (f"{name} has {n} windows of {n_ctx} tokens, fewer than {size.n}: figures are less certain",)
    return TokenWindows(name, windows, notes)


def read_windows(
    options: CalibrationOptions, source: Source, *, held_out: bool = False, encode: Encode = encode
) -> TokenWindows:
    """Return windows of the given text or ids, or else of the shipped text, to run `source` on.

    held_out: other windows of the same. encode: from the text to its ids.
    """
    size = WindowSpec(options.window, options.n_windows, held_out)
    if options.tokens is not None:
        return read_token_windows(options.tokens, source, size)
    if options.text is not None:
        return read_text_windows(options.text, source, size, encode)
    return default_windows(source, size, encode)
